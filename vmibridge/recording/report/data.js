"use strict";
// The data of the page: how it is unpacked, and how its values are written.
// Numbers of 64 bits come as hexadecimal text and stay that, for a number here has 53 bits.

/** An element. Children are nodes or text; there is no way in for markup. */
function el(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const byId = (id) => document.getElementById(id);

/** One value for each row; those that come again are in a table. */
class Column {
  constructor({ table, rows }) {
    this.table = table;
    this.rows = rows;
  }

  at(row) {
    return this.table ? this.table[this.rows[row]] : this.rows[row];
  }
}

/** The traps of the page. A row counts from 0, in the order of the list. */
class Traps {
  constructor({ facts, columns }) {
    const { lanes, retries, time, texts, ...others } = columns;
    this.facts = facts;
    this.texts = texts;
    this.lanes = lanes.map(([vm, vcpu]) => ({ vm: texts[vm], vcpu, name: `${texts[vm]}/${vcpu}` }));
    this.columns = Object.fromEntries(
      Object.entries(others).map(([name, column]) => [name, new Column(column)]),
    );
    this.count = time.length;
    this.time = new Float64Array(this.count);
    let now = 0;
    time.forEach((step, row) => (this.time[row] = now += step));
    this.duration = Float64Array.from({ length: this.count }, (_, row) => this.get("duration", row));
    this.accesses = new Int32Array(this.count + 1);
    for (let row = 0; row < this.count; row += 1) {
      this.accesses[row + 1] = this.accesses[row] + this.get("accesses", row);
    }
    this.methods = new Map();
    for (const session of facts.sessions) {
      for (const handler of session.handlers) {
        for (const [code, name] of handler.methods) this.methods.set(`${handler.name}\n${code}`, name);
      }
    }
    this.linkRetries(retries);
  }

  /** Which rows came of one request. The numbers of traps begin again with each run of a VM. */
  linkRetries(retries) {
    this.first = new Map(retries);
    this.requests = new Map();
    const key = (row, seq) => `${this.lane(row).vm}\n${this.get("run", row)}\n${seq}`;
    const asked = new Set(retries.map(([row, seq]) => key(row, seq)));
    for (let row = 0; row < this.count; row += 1) {
      const name = key(row, this.first.get(row) ?? this.get("seq", row));
      if (!asked.has(name)) continue;
      if (!this.requests.has(name)) this.requests.set(name, []);
      this.requests.get(name).push(row);
    }
    this.requestOf = (row) => this.requests.get(key(row, this.first.get(row) ?? this.get("seq", row))) ?? [];
  }

  get(name, row) {
    return this.columns[name].at(row);
  }

  /** A text of a row, or null. */
  text(name, row) {
    return this.texts[this.get(name, row)] ?? null;
  }

  lane(row) {
    return this.lanes[this.get("lane", row)];
  }

  outcome(row) {
    return this.facts.words[this.get("outcome", row)];
  }

  values(row) {
    return [1, 2, 3, 4].map((slot) => this.get(`value${slot}`, row));
  }

  /** What was written to the four registers; null for those that stayed. */
  answers(row) {
    const written = this.get("written", row);
    return [1, 2, 3, 4].map((slot) =>
      written & (1 << (slot - 1)) ? this.get(`answer${slot}`, row) : null,
    );
  }

  method(row) {
    return methodText(this.methods, this.text("what", row), this.get("method", row));
  }

  /** The row that stands at a place of the recording; undefined: it is not shown. */
  rowAt(place) {
    if (place >= 1 && place <= this.facts.first) return place - 1;
    for (let row = this.facts.first; row < this.count; row += 1) {
      if (this.get("place", row) === place) return row;
    }
    return undefined;
  }

  /** When it was taken, in UTC and to the nanosecond. */
  moment(row) {
    return momentText(BigInt(this.facts.start) + BigInt(this.time[row]));
  }
}

async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Traps(await new Response(stream).json());
}

const count = (number) => number.toLocaleString("en-GB");
const hex = (number, digits) => `0x${number.toString(16).padStart(digits, "0")}`;
const outcomeText = (word) => (word === "none" ? "no reply" : word);

function methodText(methods, handler, code) {
  if (code === null || code < 0) return "";
  return methods.get(`${handler}\n${code}`) ?? hex(code, 4);
}

function durationText(nanoseconds) {
  if (nanoseconds < 0) return "";
  const units = ["ns", "\u00b5s", "ms", "s"];
  let value = nanoseconds;
  let unit = 0;
  while (value >= 1000 && unit < 3) {
    value /= 1000;
    unit += 1;
  }
  const digits = unit === 0 || value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return `${value.toFixed(digits)} ${units[unit]}`;
}

function momentText(nanoseconds) {
  const date = new Date(Number(nanoseconds / 1000000n));
  const rest = String(nanoseconds % 1000000n).padStart(6, "0");
  return `${date.toISOString().replace("T", " ").replace("Z", "")}${rest} UTC`;
}
