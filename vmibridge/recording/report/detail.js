"use strict";
// One trap in full, in a dialog of its own.

const decimal = (digits) => BigInt(`0x${digits}`).toLocaleString("en-GB");

/** The nodes that tell of a row. `open` is called with another one. */
function detailOf(traps, row, open) {
  const error = traps.text("error", row);
  const output = traps.text("output", row);
  const outside = traps.text("outside", row);
  return [
    ...part("What", factsOf(whatOf(traps, row))),
    ...requestOf(traps, row, open),
    ...part("Request", requestTable(traps, row)),
    ...part("Answer", answerOf(traps, row)),
    ...(error === null ? [] : part("Error", textOf(error, "detail-error"))),
    ...(output === null ? [] : part("Output", textOf(output, "detail-output"))),
    ...(outside === null ? [] : part("From outside", textOf(outside, "detail-outside"))),
    ...part("Registers", registersOf(traps, row)),
    ...part("Memory", ...memoryOf(traps, row)),
  ];
}

const part = (title, ...nodes) => [el("h3", {}, title), ...nodes];
const textOf = (text, id) => el("pre", { className: "text", id }, text);

function whatOf(traps, row) {
  const outcome = traps.outcome(row);
  const taken = traps.get("taken", row);
  const width = traps.get("width", row);
  return [
    ["Outcome", el("span", { className: `outcome ${outcome}` }, outcomeText(outcome))],
    ["VM and vCPU", `${traps.lane(row).name}, trap number ${traps.get("seq", row)} of the VM`],
    ["Handler", `${traps.text("what", row)} ${traps.method(row)}`],
    ["Instruction", `${traps.text("trap", row)} of ${traps.get("length", row)} bytes at 0x${traps.get("ip", row)}, ` +
      `${width}-bit code in ring ${traps.get("ring", row)}`],
    ["Taken", `${traps.moment(row)}, ${(traps.time[row] / 1e9).toFixed(9)} s from the first shown`],
    ["Duration", taken < 0 ? "no reply" :
      `${durationText(traps.duration[row])} in the server; recorded ${durationText(taken)} after the trap`],
  ];
}

/** Links to the other traps of the same request, which was told to wait. */
function requestOf(traps, row, open) {
  const rows = traps.requestOf(row);
  const first = traps.first.get(row);
  if (rows.length < 2 && first === undefined) return [];
  const list = el("ul", { id: "detail-retries" });
  for (const other of rows) {
    const name = `trap number ${traps.get("seq", other)}, ${outcomeText(traps.outcome(other))}, ` +
      `${((traps.time[other] - traps.time[row]) / 1e6).toFixed(3)} ms`;
    list.append(el("li", {}, other === row ? `${name} (this one)` :
      el("button", { type: "button", className: "link", onclick: () => open(other) }, name)));
  }
  const missing = first !== undefined && !rows.some((other) => traps.get("seq", other) === first);
  if (missing) list.prepend(el("li", {}, `trap number ${first}, which is not on this page`));
  return part("The traps of this request", list);
}

function requestTable(traps, row) {
  if (traps.get("magic", row) < 0) return el("p", {}, "It has no register form, so there is no packet.");
  const coded = (name, digits) => {
    const value = traps.get(name, row);
    return [name, mono(hex(value, digits)), count(value)];
  };
  const rows = [
    coded("magic", 8), coded("request", 4), coded("method", 4),
    ...traps.values(row).map((value, slot) => [`value${slot + 1}`, mono(`0x${value}`), decimal(value)]),
  ];
  return tableOf(el("table", { id: "detail-packet" }), ["Field", "Hexadecimal", "Decimal"], rows, new Set([2]));
}

function answerOf(traps, row) {
  if (!traps.get("written", row)) {
    return el("p", {}, "Nothing was written: the instruction ran natively, or nothing could be.");
  }
  const rows = traps.answers(row).map((value, slot) => [
    `value${slot + 1}`,
    value === null ? "left alone" : mono(`0x${value}`),
    value === null ? "" : decimal(value),
  ]);
  return tableOf(el("table", { id: "detail-answer" }), ["Field", "Hexadecimal", "Decimal"], rows, new Set([2]));
}

function registersOf(traps, row) {
  const list = el("dl", { className: "registers mono" });
  for (const name of traps.facts.registers) {
    const value = traps.get(`reg_${name}`, row);
    list.append(el("div", { title: decimal(value) }, el("dt", {}, name), el("dd", {}, value.padStart(16, "0"))));
  }
  return list;
}

function memoryOf(traps, row) {
  const nodes = [];
  for (let at = traps.accesses[row]; at < traps.accesses[row + 1]; at += 1) nodes.push(accessOf(traps, at));
  if (!nodes.length) nodes.push(el("p", {}, "No access was recorded."));
  const left = traps.get("left_out", row);
  if (left) nodes.push(el("p", {}, `${count(left)} further accesses are not shown.`));
  return nodes;
}

function accessOf(traps, at) {
  const flags = traps.get("access_flags", at);
  const address = traps.get("access_address", at);
  const size = BigInt(`0x${traps.get("access_size", at)}`);
  const error = traps.texts[traps.get("access_error", at)];
  const data = traps.get("access_data", at);
  const bytes = data === null ? 0 : data.length / 2;
  const failure = error !== undefined ? `: failed, ${error}`
    : flags & 2 ? ": the bytes had no room on this page"
      : data === null ? ": the bytes were left out"
        : BigInt(bytes) < size ? `, the first ${bytes} shown` : "";
  return el("div", { className: "access" },
    el("p", {}, `${flags & 1 ? "Wrote" : "Read"} ${decimal(size.toString(16))} bytes at physical `, mono(`0x${address}`), failure),
    bytes ? el("pre", {}, dumpOf(BigInt(`0x${address}`), data)) : null);
}

/** Lines of 16 bytes: address, hexadecimal, ASCII. */
function dumpOf(address, data) {
  const lines = [];
  for (let at = 0; at < data.length; at += 32) {
    const pairs = data.slice(at, at + 32).match(/../g);
    const ascii = pairs.map((pair) => {
      const code = parseInt(pair, 16);
      return code >= 32 && code < 127 ? String.fromCharCode(code) : ".";
    });
    const place = (address + BigInt(at / 2)).toString(16).padStart(12, "0");
    lines.push(`${place}  ${pairs.join(" ").padEnd(47)}  ${ascii.join("")}`);
  }
  return lines.join("\n");
}
