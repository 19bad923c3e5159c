"use strict";
// The list of traps: which pass the filters, and as many rows in the page as can be seen.

const ROW_HEIGHT = 28;
const BESIDE = 8;

/** The rows that a view chooses. `view` has what the filters have. */
function chosenRows(traps, view) {
  const { what, outcome, lane, text, min, within, from, to } = view;
  const tests = [];
  if (what) tests.push((row) => traps.text("what", row) === what);
  if (outcome) tests.push((row) => traps.outcome(row) === outcome);
  if (lane.startsWith("vm:")) tests.push((row) => traps.lane(row).vm === lane.slice(3));
  else if (lane) tests.push((row) => traps.lane(row).name === lane);
  if (min > 0) tests.push((row) => traps.duration[row] >= min * 1000);
  if (within && to !== null) {
    tests.push((row) => traps.time[row] <= to &&
      traps.time[row] + Math.max(traps.get("taken", row), 0) >= from);
  }
  if (text.trim()) {
    const wanted = text.trim().toLowerCase();
    tests.push((row) => searchTextOf(traps, row).includes(wanted));
  }
  const rows = [];
  for (let row = 0; row < traps.count; row += 1) {
    if (tests.every((test) => test(row))) rows.push(row);
  }
  return rows;
}

/** What a free text is looked for in: texts, names, and each number as 0x... */
function searchTextOf(traps, row) {
  traps.searchTexts ??= new Array(traps.count);
  return (traps.searchTexts[row] ??= [
    traps.text("error", row) ?? "",
    traps.text("output", row) ?? "",
    traps.text("what", row),
    traps.method(row),
    ...[traps.get("ip", row), ...traps.values(row), ...traps.answers(row)].map((value) => value && `0x${value}`),
  ].join("\n").toLowerCase());
}

class TrapList {
  /** `open` is called with a row. */
  constructor(traps, open) {
    this.traps = traps;
    this.open = open;
    this.rows = [];
    this.active = 0;
    this.box = byId("list");
    this.body = byId("list-body");
    const head = { place: "Trap", time: "Time, s", lane: "VM/vCPU", what: "Handler", method: "Method", outcome: "Outcome",
      values: "Values", answer: "Answer", duration: "Duration", told: "Output or error" };
    byId("list-head").append(...Object.entries(head).map(([name, text]) =>
      el("span", { role: "columnheader", className: `${name}${name === "duration" ? " number" : ""}` }, text)));
    this.box.addEventListener("scroll", () => this.draw(), { passive: true });
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.body.addEventListener("click", (event) => {
      const place = event.target.closest("[data-place]")?.dataset.place;
      if (place === undefined) return;
      this.active = Number(place);
      this.draw();
      this.open(this.rows[this.active]);
    });
    new ResizeObserver(() => this.draw()).observe(this.box);
  }

  show(rows) {
    const before = this.rows[this.active];
    this.rows = rows;
    this.active = Math.max(0, rows.indexOf(before));
    this.box.setAttribute("aria-rowcount", rows.length + 1);
    this.body.style.height = `${rows.length * ROW_HEIGHT}px`;
    byId("count").textContent = `${count(rows.length)} of ${count(this.traps.count)} shown`;
    this.reveal();
  }

  /** Make a row the active one, where the filters let it through. */
  choose(row) {
    const place = this.rows.indexOf(row);
    if (place < 0) return;
    this.active = place;
    this.reveal();
  }

  /** The row before or behind another one. */
  beside(row, step) {
    const place = this.rows.indexOf(row);
    return place < 0 ? undefined : this.rows[place + step];
  }

  reveal() {
    const [top, head] = [this.active * ROW_HEIGHT, byId("list-head").offsetHeight];
    const room = this.box.clientHeight - head - ROW_HEIGHT;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top > this.box.scrollTop + room) this.box.scrollTop = top - room;
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW_HEIGHT) - BESIDE);
    const last = Math.min(this.rows.length, first + Math.ceil(this.box.clientHeight / ROW_HEIGHT) + 2 * BESIDE);
    const nodes = [];
    for (let place = first; place < last; place += 1) nodes.push(this.rowOf(place));
    this.body.replaceChildren(...nodes);
    if (nodes.length) this.box.setAttribute("aria-activedescendant", `row-${this.active}`);
    else this.box.removeAttribute("aria-activedescendant");
  }

  rowOf(place) {
    const { traps } = this;
    const row = this.rows[place];
    const outcome = traps.outcome(row);
    const cell = (className, text) => el("span", { role: "gridcell", className }, text);
    const short = (value) => value ?? ".";
    const node = el("div", { role: "row", id: `row-${place}`, "aria-rowindex": place + 2, "data-place": place,
      "aria-selected": String(place === this.active), className: place === this.active ? "active" : "" },
      cell("place", String(traps.get("place", row))),
      cell("time", (traps.time[row] / 1e9).toFixed(6)),
      cell("lane", traps.lane(row).name),
      cell("what", traps.text("what", row)),
      cell("method", traps.method(row)),
      cell(`outcome ${outcome}`, outcomeText(outcome)),
      cell("values mono", traps.values(row).join(" ")),
      cell("answer mono", traps.answers(row).map(short).join(" ")),
      cell("duration number", durationText(traps.duration[row])),
      cell("told", (traps.text("error", row) ?? traps.text("output", row) ?? "").slice(0, 200)));
    node.style.top = `${place * ROW_HEIGHT}px`;
    return node;
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.box.clientHeight / ROW_HEIGHT) - 2);
    const steps = { ArrowUp: -1, ArrowDown: 1, PageUp: -page, PageDown: page, Home: -Infinity, End: Infinity };
    if (event.key === "Enter" && this.rows.length) {
      this.open(this.rows[this.active]);
    } else if (event.key in steps) {
      this.active = Math.max(0, Math.min(this.rows.length - 1, this.active + steps[event.key]));
      this.reveal();
    } else {
      return;
    }
    event.preventDefault();
  }
}
