"use strict";
// The page as a whole. What is looked at is in the address behind #, so that it can be shared:
// the filters, the part of the timeline, and the open trap by its place in the recording.

const EVERYTHING = { what: "", outcome: "", lane: "", text: "", min: "", within: false, from: null, to: null, trap: null };

function viewOf(hash) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const text = (name) => given.get(name) ?? "";
  const number = (name) => (/^\d{1,16}$/.test(text(name)) ? Number(text(name)) : null);
  const [from, to] = [number("from"), number("to")];
  const part = from !== null && to !== null && from < to;
  return {
    what: text("what"), outcome: text("outcome"), lane: text("lane"), text: text("text"),
    min: Number(text("min")) > 0 ? text("min") : "", within: given.has("within"),
    from: part ? from : null, to: part ? to : null, trap: number("trap"),
  };
}

function hashOfView(view) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(view)) {
    if (value !== EVERYTHING[name]) query.set(name, value);
  }
  return `#${query}`;
}

class Page {
  constructor(traps) {
    this.traps = traps;
    this.view = { ...EVERYTHING };
    const open = (row) => this.set({ trap: traps.get("place", row) }, { push: true });
    showSummary(traps, {
      open,
      chooseOutcome: (word) => {
        this.set({ outcome: this.view.outcome === word ? "" : word });
        byId("traps-title").scrollIntoView({ block: "nearest" });
      },
    });
    byId("main").hidden = false;
    this.timeline = new Timeline(traps, { open, moved: (from, to) => this.setSoon({ from, to }) });
    this.list = new TrapList(traps, open);
    this.fields = { what: byId("filter-what"), outcome: byId("filter-outcome"), lane: byId("filter-lane"),
      text: byId("filter-text"), min: byId("filter-min"), within: byId("filter-within") };
    this.fillFilters();
    this.listen(open);
    this.view = viewOf(location.hash);
    this.apply(true);
  }

  /** What the filters choose from: what there is. */
  fillFilters() {
    const { traps, fields } = this;
    const whats = new Set();
    for (let row = 0; row < traps.count; row += 1) whats.add(traps.text("what", row));
    const fill = (select, options) =>
      select.append(...[["", "all"], ...options].map(([value, text]) => el("option", { value }, text)));
    fill(fields.what, [...whats].sort().slice(0, 1000).map((what) => [what, what]));
    fill(fields.outcome, traps.facts.words.filter((word) => traps.facts.outcomes[word]).map((word) => [word, outcomeText(word)]));
    const vms = [...new Set(traps.lanes.map(({ vm }) => vm))].sort().slice(0, 1000);
    const lanes = this.timeline.lanes.map(({ name }) => [name, name]);
    fill(fields.lane, [...vms.map((vm) => [`vm:${vm}`, `all of ${vm}`]), ...lanes]);
  }

  listen(open) {
    const { fields } = this;
    for (const name of ["what", "outcome", "lane"]) {
      fields[name].addEventListener("change", () => this.set({ [name]: fields[name].value }));
    }
    for (const name of ["text", "min"]) {
      fields[name].addEventListener("input", () => this.setSoon({ [name]: fields[name].value }));
    }
    fields.within.addEventListener("change", () => this.set({ within: fields.within.checked }));
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("filters").addEventListener("reset", (event) => {
      event.preventDefault();
      const { from, to, trap } = this.view;
      this.set({ ...EVERYTHING, from, to, trap });
    });
    addEventListener("hashchange", () => {
      this.view = viewOf(location.hash);
      this.apply(true);
    });
    const dialog = byId("detail");
    const turn = (step) => {
      const row = this.list.beside(this.traps.rowAt(this.view.trap), step);
      if (row !== undefined) this.set({ trap: this.traps.get("place", row) });
    };
    byId("previous").addEventListener("click", () => turn(-1));
    byId("next").addEventListener("click", () => turn(1));
    byId("close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => {
      if (this.view.trap !== null) this.set({ trap: null });
    });
    dialog.addEventListener("click", (event) => {
      // Beside it: what the dialog is clicked on itself is its backdrop or its edge.
      if (event.target === dialog && event.offsetX < 0) dialog.close();
    });
    this.open = open;
  }

  /** Change the view. `push`: a step that the browser's Back takes back. */
  set(changes, { push = false } = {}) {
    clearTimeout(this.timer);
    this.view = { ...this.view, ...this.pending, ...changes };
    this.pending = {};
    if (push) history.pushState(null, "", hashOfView(this.view));
    else history.replaceState(null, "", hashOfView(this.view));
    this.apply(false);
  }

  /** The same, once nothing more comes for a moment: typing, a wheel. */
  setSoon(changes) {
    clearTimeout(this.timer);
    this.pending = { ...this.pending, ...changes };
    this.timer = setTimeout(() => this.set({}), 200);
  }

  /** Show the view. `whole`: controls and timeline, too, as what is shown came from outside. */
  apply(whole) {
    const { view, fields, traps } = this;
    for (const [name, field] of Object.entries(fields)) {
      if (field.type === "checkbox") field.checked = view[name];
      else if (field.value !== view[name]) field.value = view[name];
    }
    for (const tile of document.querySelectorAll("[data-outcome]")) {
      tile.setAttribute("aria-pressed", String(tile.dataset.outcome === view.outcome));
    }
    if (whole) this.timeline.show(view.from ?? 0, view.to ?? this.timeline.end);
    const { trap, from, to, ...filters } = view;
    const chosen = JSON.stringify(view.within ? { ...filters, from, to } : filters);
    if (chosen !== this.chosen) {
      this.chosen = chosen;
      this.list.show(chosenRows(traps, view));
    }
    this.showTrap(trap === null ? undefined : traps.rowAt(trap));
  }

  showTrap(row) {
    const dialog = byId("detail");
    if (row === undefined) {
      if (dialog.open) dialog.close();
      return;
    }
    const { traps, list } = this;
    byId("detail-title").textContent = `Trap ${traps.get("place", row)} of ${count(traps.facts.count)}`;
    byId("detail-body").replaceChildren(...detailOf(traps, row, this.open));
    byId("previous").disabled = list.beside(row, -1) === undefined;
    byId("next").disabled = list.beside(row, 1) === undefined;
    list.choose(row);
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  }
}

async function start() {
  if (!("DecompressionStream" in window)) {
    throw new Error("this browser cannot unpack the data: take one of 2023 or later");
  }
  const data = byId("data");
  const traps = await unpack(data.textContent);
  data.remove();
  return new Page(traps);
}

start().catch((error) => {
  byId("about").textContent = `The report cannot be shown: ${error.message}`;
  throw error;
});
