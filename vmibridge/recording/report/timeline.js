"use strict";
// The timeline: a strip for each vCPU, a slice for each trap from when it was taken to its reply.
// Where several slices share a pixel, the worst outcome has its colour.

const AXIS = 24;
const LANE = 26;
const MAX_LANES = 256;
const SHORTEST_VIEW = 100;
const BEST_TO_WORST = [
  "handled", "unmatched", "rejected", "waiting", "denied", "cancelled", "timeout", "failed", "none",
];

class Timeline {
  /** `moved` is called with the part that is shown, in nanoseconds; `open` with a row. */
  constructor(traps, { open, moved }) {
    this.traps = traps;
    this.open = open;
    this.moved = moved;
    this.canvas = byId("timeline");
    this.tip = byId("tip");
    this.rank = traps.facts.words.map((word) => BEST_TO_WORST.indexOf(word));
    this.end = 1;
    this.lanes = this.sorted();
    this.from = 0;
    this.to = this.end;
    this.selection = null;
    this.canvas.setAttribute("aria-label",
      `Timeline of ${count(traps.count)} traps on ${traps.lanes.length} vCPUs; the list below has them all`);
    const left = traps.lanes.length - this.lanes.length;
    byId("lanes-left-out").hidden = !left;
    byId("lanes-left-out").textContent = `${count(left)} more vCPUs are not drawn.`;
    byId("legend").append(...traps.facts.words.filter((word) => traps.facts.outcomes[word]).map((word) =>
      el("span", { className: `outcome ${word}` }, outcomeText(word))));
    this.listen();
    new ResizeObserver(() => this.draw()).observe(byId("timeline-box"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** The rows of each vCPU by time. */
  sorted() {
    const { traps } = this;
    const rows = traps.lanes.map(() => []);
    for (let row = 0; row < traps.count; row += 1) {
      rows[traps.get("lane", row)].push(row);
      this.end = Math.max(this.end, this.endOf(row));
    }
    const order = [...traps.lanes.keys()].sort((one, other) => {
      const [a, b] = [traps.lanes[one], traps.lanes[other]];
      return a.vm === b.vm ? a.vcpu - b.vcpu : a.vm < b.vm ? -1 : 1;
    });
    return order.slice(0, MAX_LANES).map((lane) => ({
      name: traps.lanes[lane].name,
      rows: rows[lane].sort((one, other) => traps.time[one] - traps.time[other]),
    }));
  }

  endOf(row) {
    return this.traps.time[row] + Math.max(this.traps.get("taken", row), 0);
  }

  // --- drawing ------------------------------------------------------------------------

  draw() {
    const scale = devicePixelRatio || 1;
    this.width = byId("timeline-box").clientWidth;
    this.height = AXIS + this.lanes.length * LANE;
    this.canvas.style.height = `${this.height}px`;
    this.canvas.width = Math.round(this.width * scale);
    this.canvas.height = Math.round(this.height * scale);
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`);
    const paint = this.canvas.getContext("2d");
    paint.scale(scale, scale);
    paint.font = "12px system-ui, sans-serif";
    paint.textBaseline = "middle";
    this.gutter = Math.min(160, this.width / 4,
      12 + Math.max(...this.lanes.map(({ name }) => paint.measureText(name).width), 20));
    this.drawAxis(paint, colour);
    const colours = this.traps.facts.words.map(colour);
    this.lanes.forEach((lane, place) => {
      const top = AXIS + place * LANE;
      paint.fillStyle = colour("line");
      paint.fillRect(0, top, this.width, 1);
      paint.fillStyle = colour("text");
      paint.fillText(lane.name, 6, top + LANE / 2, this.gutter - 10);
      this.drawLane(paint, lane.rows, top + 4, colours);
    });
    if (this.selection) {
      paint.globalAlpha = 0.25;
      paint.fillStyle = colour("accent");
      const [from, to] = this.selection;
      paint.fillRect(Math.min(from, to), 0, Math.abs(to - from), this.height);
    }
  }

  drawAxis(paint, colour) {
    const span = this.to - this.from;
    const rough = span / Math.max(2, Math.floor((this.width - this.gutter) / 120));
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= rough);
    const digits = Math.min(9, Math.max(0, Math.ceil(9 - Math.log10(step))));
    for (let at = Math.ceil(this.from / step) * step; at <= this.to; at += step) {
      const x = this.xOf(at);
      paint.fillStyle = colour("line");
      paint.fillRect(x, 0, 1, this.height);
      paint.fillStyle = colour("quiet");
      paint.fillText(`${(at / 1e9).toFixed(digits)} s`, x + 4, AXIS / 2);
    }
  }

  drawLane(paint, rows, top, colours) {
    const { traps, rank } = this;
    const left = Math.ceil(this.gutter);
    const worst = new Int8Array(Math.ceil(this.width) + 1).fill(-1);
    const wide = [];
    for (let at = this.firstOf(rows); at < rows.length && traps.time[rows[at]] <= this.to; at += 1) {
      const row = rows[at];
      const from = Math.max(this.xOf(traps.time[row]), left);
      const to = Math.min(this.xOf(this.endOf(row)), this.width);
      if (to < left) continue;
      if (to - from >= 3) {
        wide.push([from, to - from - 1, row]);
        continue;
      }
      const outcome = traps.get("outcome", row);
      const last = Math.max(Math.floor(from), Math.floor(to - 0.01));
      for (let x = Math.floor(from); x <= last; x += 1) {
        if (worst[x] < 0 || rank[outcome] > rank[worst[x]]) worst[x] = outcome;
      }
    }
    for (const [from, size, row] of wide) {
      paint.fillStyle = colours[traps.get("outcome", row)];
      paint.fillRect(from, top, size, LANE - 7);
    }
    for (let x = left; x < worst.length; x += 1) {
      if (worst[x] < 0) continue;
      paint.fillStyle = colours[worst[x]];
      paint.fillRect(x, top, 1, LANE - 7);
    }
  }

  xOf(time) {
    return this.gutter + ((time - this.from) / (this.to - this.from)) * (this.width - this.gutter);
  }

  timeAt(x) {
    return this.from + ((x - this.gutter) / (this.width - this.gutter)) * (this.to - this.from);
  }

  // --- finding ------------------------------------------------------------------------

  /** The first of these rows that may reach into what is shown. */
  firstOf(rows, time = this.from) {
    let [low, high] = [0, rows.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.traps.time[rows[middle]] < time) low = middle + 1;
      else high = middle;
    }
    // A vCPU has one trap at a time; a damaged recording may have a few more.
    return Math.max(0, low - 4);
  }

  /** The row at a point of the canvas: the worst of those within two pixels, then the nearest. */
  rowAt(x, y) {
    const lane = this.lanes[Math.floor((y - AXIS) / LANE)];
    if (!lane || y < AXIS || x < this.gutter) return undefined;
    let best;
    let bestScore = Infinity;
    for (let at = this.firstOf(lane.rows, this.timeAt(x - 4)); at < lane.rows.length; at += 1) {
      const row = lane.rows[at];
      const from = this.xOf(this.traps.time[row]);
      if (from > x + 4) break;
      const distance = Math.max(from - x, x - this.xOf(this.endOf(row)), 0);
      const score = distance > 4 ? Infinity : (distance > 2 ? 100 : 0) + distance - 10 * this.rank[this.traps.get("outcome", row)];
      if (score < bestScore) [best, bestScore] = [row, score];
    }
    return best;
  }

  // --- moving -------------------------------------------------------------------------

  show(from, to) {
    const span = Math.min(Math.max(to - from, SHORTEST_VIEW), this.end);
    const start = Math.min(Math.max((from + to - span) / 2, 0), this.end - span);
    [this.from, this.to] = [start, start + span];
    this.draw();
  }

  move(from, to) {
    this.show(from, to);
    this.tip.hidden = true;
    const whole = this.from <= 0 && this.to >= this.end;
    this.moved(whole ? null : Math.floor(this.from), whole ? null : Math.ceil(this.to));
  }

  zoom(factor, at = (this.from + this.to) / 2) {
    this.move(at - (at - this.from) * factor, at + (this.to - at) * factor);
  }

  shift(part) {
    const step = (this.to - this.from) * part;
    this.move(this.from + step, this.to + step);
  }

  listen() {
    const { canvas } = this;
    const actions = {
      earlier: () => this.shift(-0.3), later: () => this.shift(0.3), "zoom-in": () => this.zoom(0.5),
      "zoom-out": () => this.zoom(2), "zoom-all": () => this.move(0, this.end),
    };
    for (const [id, act] of Object.entries(actions)) byId(id).addEventListener("click", act);
    const keys = { ArrowLeft: "earlier", ArrowRight: "later", "+": "zoom-in", "=": "zoom-in", "-": "zoom-out", 0: "zoom-all" };
    canvas.addEventListener("keydown", (event) => {
      if (!(event.key in keys) || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      actions[keys[event.key]]();
    });
    canvas.addEventListener("wheel", (event) => {
      // Where all is shown already, turning back scrolls the page as elsewhere.
      const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY);
      if (!sideways && event.deltaY > 0 && this.to - this.from >= this.end) return;
      event.preventDefault();
      if (sideways) this.shift(event.deltaX / this.width);
      else this.zoom(1.0015 ** event.deltaY, this.timeAt(Math.max(event.offsetX, this.gutter)));
    }, { passive: false });
    let start = null;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      start = { x: event.offsetX, from: this.from, to: this.to, shift: event.shiftKey };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      const { offsetX: x } = event;
      if (start === null || Math.abs(x - start.x) < 4) {
        this.hover(event);
      } else if (start.shift) {
        const step = ((start.x - x) / (this.width - this.gutter)) * (start.to - start.from);
        this.move(start.from + step, start.to + step);
      } else {
        this.selection = [start.x, x];
        this.tip.hidden = true;
        this.draw();
      }
    });
    canvas.addEventListener("pointerup", (event) => {
      const { selection } = this;
      const moved = start !== null && Math.abs(event.offsetX - start.x) >= 4;
      const clicked = start !== null && !moved;
      [start, this.selection] = [null, null];
      if (clicked) {
        const row = this.rowAt(event.offsetX, event.offsetY);
        this.tip.hidden = true;
        if (row !== undefined) this.open(row);
      } else if (selection) {
        const [from, to] = selection.sort((one, other) => one - other).map((x) => this.timeAt(x));
        this.move(from, to);
      }
    });
    canvas.addEventListener("pointercancel", () => {
      [start, this.selection] = [null, null];
      this.draw();
    });
    canvas.addEventListener("pointerleave", () => (this.tip.hidden = true));
  }

  hover(event) {
    const row = this.rowAt(event.offsetX, event.offsetY);
    this.tip.hidden = row === undefined;
    if (row === undefined) return;
    const { traps, tip } = this;
    const text = traps.text("error", row) ?? traps.text("output", row) ?? "";
    tip.textContent = [
      `Trap ${traps.get("place", row)} of ${traps.lane(row).name}: ${outcomeText(traps.outcome(row))}`,
      `${traps.text("what", row)} ${traps.method(row)}`,
      `at ${(traps.time[row] / 1e9).toFixed(6)} s, ${durationText(traps.duration[row]) || "no reply"}`,
      text.slice(0, 160),
    ].join("\n").trim();
    const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    const below = event.clientY + 18;
    tip.style.left = `${Math.max(left, 8)}px`;
    tip.style.top = `${below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 8 : below}px`;
  }
}
