"use strict";
// What a recording is as a whole: problems, sessions, totals, latencies, the slowest traps.

function showSummary(traps, { open, chooseOutcome }) {
  const { facts } = traps;
  byId("about").textContent =
    `${facts.file}, ${count(facts.size)} bytes: ${count(facts.count)} traps from ` +
    `${momentText(BigInt(facts.began))}, over ${durationText(facts.span)}. ` +
    `Made by vmibridge ${facts.version}.`;
  byId("problems").hidden = facts.problems.length === 0;
  byId("problem-list").append(...facts.problems.map((line) => el("li", {}, line)));
  byId("shown").textContent = shownText(traps);
  byId("sessions").append(...facts.sessions.map(sessionOf));
  showTotals(facts, chooseOutcome);
  showGroups(traps);
  showSlowest(traps, open);
  showLatency(facts.latencies);
}

function shownText({ facts, count: shown }) {
  const memory = `Of each trap at most ${facts.max_accesses} memory accesses are shown, with up to ` +
    `${facts.max_bytes} bytes each.`;
  if (shown === facts.count) return `All traps are on this page. ${memory}`;
  const left = facts.failed_left_out
    ? `; ${count(facts.failed_left_out)} more of these are not shown`
    : "";
  return (
    `Totals, latencies and the table of handlers count all ${count(facts.count)} traps. Timeline and ` +
    `list show ${count(shown)}: the first ${count(facts.first)} and, of those behind them, the slowest ` +
    `and ${count(facts.failed)} that failed, timed out or have no reply${left}. ${memory}`
  );
}

function factsOf(pairs) {
  const list = el("dl", { className: "facts" });
  for (const [name, value] of pairs) list.append(el("dt", {}, name), el("dd", {}, value));
  return list;
}

function sessionOf(session, at, sessions) {
  const facts = el("dl", { className: "session-facts" }, ...[
    ["VM", session.vm],
    ["Started", session.started || "not known"],
    ["Event loop", session.loop || "not known"],
    ["Versions", session.versions.join(", ") || "not known"],
    ["Left out", session.redaction.join(", ") || "nothing"],
  ].map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  const head = ["Handler", "Class", "Magic", "Request", "Stamps", "Methods", "Source"];
  const rows = session.handlers.map((each) => [
    each.name,
    each.type,
    mono(each.magic ?? "any"),
    mono(hex(each.request, 4)),
    mono(each.verify.map((value, slot) => value && `${slot + 1}: ${value}`).filter(Boolean).join(", ")),
    each.methods.map(([code, name]) => `${hex(code, 4)} ${name}`).join(", "),
    el("span", {}, each.source ?? "", each.sha256 && el("br"), each.sha256 && hashOf(each.sha256)),
  ]);
  const number = session.handlers.length + session.more_handlers;
  const handlers = el(
    "details",
    { open: number <= 4 && sessions.length === 1 },
    el("summary", {}, `${number} ${number === 1 ? "handler" : "handlers"}`),
    el("div", { className: "scroll" }, tableOf(el("table"), head, rows)),
    session.more_handlers ? el("p", {}, `${session.more_handlers} more are not shown`) : null,
  );
  return el("div", { className: "session" }, facts, handlers);
}

const mono = (text) => el("span", { className: "mono" }, text);
const hashOf = (sha256) =>
  el("span", { className: "mono quiet", title: `SHA-256 ${sha256}` }, `${sha256.slice(0, 16)}\u2026`);

/** Fill a table. A cell is text or a node; the columns in `numbers` are right-aligned. */
function tableOf(table, head, rows, numbers = new Set()) {
  const kind = (column) => (numbers.has(column) ? "number" : "");
  table.append(
    el("thead", {}, el("tr", {}, ...head.map((text, column) =>
      el("th", { scope: "col", className: kind(column) }, text)))),
    el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells.map((cell, column) =>
      el("td", { className: cell === "0" ? "number zero" : kind(column) }, cell))))),
  );
  return table;
}

function showTotals({ words, outcomes, count: total }, choose) {
  const tile = (word, number, text) =>
    el("button", { type: "button", className: `tile ${word}`, "data-outcome": word,
      "aria-pressed": "false", onclick: () => choose(word) }, el("b", {}, count(number)), text);
  byId("outcomes").append(
    tile("", total, "all traps"),
    ...words.filter((word) => outcomes[word]).map((word) => tile(word, outcomes[word], outcomeText(word))),
  );
}

function showGroups({ facts, methods }) {
  const words = facts.words.filter((word) => facts.outcomes[word]);
  const head = ["Handler", "Request", "Method", "Traps", ...words.map(outcomeText), "Median", "p99", "Longest"];
  const rows = facts.groups.map((group) => [
    group.handler ?? "(none)",
    mono(group.request === null ? "" : hex(group.request, 4)),
    methodText(methods, group.label, group.method),
    count(Object.values(group.outcomes).reduce((sum, number) => sum + number, 0)),
    ...words.map((word) => count(group.outcomes[word] ?? 0)),
    ...[group.p50, group.p99, group.max].map(durationText),
  ]);
  tableOf(byId("groups"), head, rows, new Set([...head.keys()].slice(3)));
}

function showSlowest(traps, open) {
  const head = ["Duration", "Trap", "VM/vCPU", "Handler", "Method", "Outcome", "Output or error"];
  const rows = traps.facts.slowest.map((row) => [
    el("button", { type: "button", className: "link", onclick: () => open(row) }, durationText(traps.duration[row])),
    String(traps.get("place", row)),
    traps.lane(row).name,
    traps.text("what", row),
    traps.method(row),
    el("span", { className: `outcome ${traps.outcome(row)}` }, outcomeText(traps.outcome(row))),
    (traps.text("error", row) ?? traps.text("output", row) ?? "").slice(0, 120),
  ]);
  tableOf(byId("slowest"), head, rows, new Set([1]));
}

function showLatency(latencies) {
  const select = byId("latency-of");
  select.append(...latencies.map(({ label, count: number }, at) =>
    el("option", { value: at }, `${label} (${count(number)})`)));
  const figure = byId("histogram");
  const draw = () => figure.replaceChildren(histogramOf(latencies[select.value], figure.clientWidth));
  const show = () => {
    const latency = latencies[select.value];
    draw();
    byId("quantiles").replaceChildren(
      ...["p50", "p90", "p99", "p99.9", "max"].flatMap((name) => [
        el("dt", {}, name),
        el("dd", { className: "number", "data-quantile": name }, latency.count ? durationText(latency[name]) : "none"),
      ]),
    );
  };
  select.addEventListener("change", show);
  show();
  new ResizeObserver(draw).observe(figure);
}

function svg(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** Bars of a quarter of an octave over a logarithmic axis, with the quantiles. */
function histogramOf(latency, wide) {
  const [width, height, foot, top] = [Math.max(wide, 280), 220, 22, 44];
  const bars = new Map();
  for (const [bucket, number] of latency.buckets) {
    const bar = Math.floor(bucket / 8);
    bars.set(bar, (bars.get(bar) ?? 0) + number);
  }
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  if (!bars.size) {
    drawing.append(svg("text", { x: 10, y: 30 }, "no trap with a reply"));
    return drawing;
  }
  const beside = Math.max(2, Math.ceil((16 - (Math.max(...bars.keys()) - Math.min(...bars.keys()))) / 2));
  const first = Math.min(...bars.keys()) - beside;
  const last = Math.max(...bars.keys()) + beside + 1;
  const most = Math.max(...bars.values());
  const x = (bar) => ((bar - first) / (last - first)) * width;
  const xOf = (nanoseconds) => x(Math.log2(Math.max(nanoseconds, 1)) * 4);
  const base = height - foot;
  drawing.append(svg("title", {}, `Latency of ${latency.label}: how many traps took how long`));
  drawing.append(svg("line", { class: "axis", x1: 0, x2: width, y1: base, y2: base }));
  for (let decade = 1; decade < 1e17; decade *= 10) {
    const at = xOf(decade);
    if (Math.log2(decade) * 4 < first || at < 15 || at > width - 15) continue;
    drawing.append(
      svg("line", { class: "axis", x1: at, x2: at, y1: top, y2: base }),
      svg("text", { x: at, y: height - 6, "text-anchor": "middle" }, durationText(decade).replace(/\.0+/, "")),
    );
  }
  for (const [bar, number] of bars) {
    const tall = Math.max(2, (number / most) * (base - top));
    const from = durationText(2 ** (bar / 4));
    drawing.append(
      svg("rect", { class: "bar", x: x(bar) + 0.5, y: base - tall, width: Math.max(x(bar + 1) - x(bar) - 1, 1), height: tall },
        svg("title", {}, `${count(number)} traps of ${from} to ${durationText(2 ** ((bar + 1) / 4))}`)),
    );
  }
  ["p50", "p90", "p99"].forEach((name, step) => {
    const at = xOf(latency[name]);
    const y = 12 + step * 13;
    const side = at > width - 90 ? { x: at - 4, "text-anchor": "end" } : { x: at + 4 };
    drawing.append(
      svg("line", { class: "mark", x1: at, x2: at, y1: y - 9, y2: base }),
      svg("text", { class: "mark-text", y, ...side }, `${name} ${durationText(latency[name])}`),
    );
  });
  return drawing;
}
