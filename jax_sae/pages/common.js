"use strict";
// Everything that is shown is put in as text (textContent), never as HTML: stories, tokens, labels and notes may hold any.

const facts = JSON.parse(document.getElementById("facts").textContent);
const $ = (id) => document.getElementById(id);
const ROW = 28; // pixels of a row of the table, as in the style
const PARSED = new Promise((done) => {
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", done, { once: true });
  else done();
});

// ---- elements -------------------------------------------------------------------------------------------------------

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria") || name === "role") element.setAttribute(name.replace(/^aria/, "aria-").toLowerCase(), value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

function drawn(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
}

const percent = (value) => (value === 0 ? "0" : `${number(100 * value, 2)}%`);
const say = (text) => { $("message").textContent = text; };

// ---- blocks: data in this file, or in scripts beside it --------------------------------------------------------------

const page = {
  arriving: new Map(), // name -> what to do with the block that a script hands over
  take(name, text) {
    page.arriving.get(name)?.(text);
    page.arriving.delete(name);
  },
};
const blocks = new Map(); // name -> promise; the newest ones last

function load(name, keep = true) {
  let found = blocks.get(name);
  if (!found) {
    found = textOf(name).then(unpacked);
    found.catch(() => blocks.delete(name));
  }
  blocks.delete(name);
  blocks.set(name, found);
  if (!keep) setTimeout(forget);
  return found;
}

function forget() {
  const large = [...blocks.keys()].filter((name) => /^\d+-\d+$/.test(name));
  for (const name of large.slice(0, -8)) blocks.delete(name);
}

async function textOf(name) {
  await PARSED;
  const element = $(`block-${name}`);
  if (element) return element.textContent;
  return new Promise((resolve, reject) => {
    page.arriving.set(name, resolve);
    const script = make("script", { src: `data-${name}.js` });
    script.onerror = () => reject(new Error(`data-${name}.js is not beside this page: keep the folder together`));
    script.onload = () => script.remove();
    document.head.append(script);
  });
}

async function unpacked(text) {
  const zipped = Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const size = new DataView(buffer).getUint32(0, true);
  const content = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  const base = Math.ceil((4 + size) / 8) * 8;
  const types = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, int32: Int32Array, float32: Float32Array };
  for (const [name, [type, at, length]] of Object.entries(content.arrays)) {
    content[name] = new types[type](buffer, base + at, length);
  }
  return content;
}

function section(title, ...content) {
  for (const table of content.filter(({ tagName }) => tagName === "TABLE")) table.ariaLabel = title;
  return make("section", {}, make("h3", { textContent: title }), ...content);
}

function ticks(from, to) { // of a logarithmic axis; where it is short, at equal distances
  const all = [];
  for (let e = Math.floor(from); e <= to; e++) for (const m of to - from > 2.5 ? [1] : [1, 2, 5]) all.push(m * 10 ** e);
  const found = all.filter((each) => Math.log10(each) >= from && Math.log10(each) <= to);
  if (found.length > 1) return found;
  const [low, high] = [10 ** from, 10 ** to];
  const decade = 10 ** Math.floor(Math.log10(high - low));
  const step = [1, 0.5, 0.2].map((part) => part * decade).find((each) => (high - low) / each > 2);
  return Array.from({ length: 12 }, (_, i) => (Math.ceil(low / step) + i) * step).filter((each) => each <= high);
}

// ---- tables -----------------------------------------------------------------------------------------------------------

function tableOf(titles, lines) {
  const head = make("tr", {}, ...titles.map((title, i) => make("th", { scope: "col", className: i ? "number" : "", textContent: title })));
  const body = lines.map((cells) => make("tr", {}, ...cells.map((cell, i) => make("td", { className: i ? "number" : "" }, cell))));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}

class Rows { // of a long table, as many as can be seen
  constructor(box, space, rowAt) {
    Object.assign(this, { box, space, rowAt, there: new Map() }); // number -> its element
  }

  draw(count, chosen, anew) {
    this.space.style.height = `${count * ROW}px`;
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW) - 5);
    const last = Math.min(count, first + Math.ceil((this.box.clientHeight || 640) / ROW) + 10);
    for (const [i, row] of this.there) {
      if (anew || i < first || i >= last) {
        row.remove();
        this.there.delete(i);
      }
    }
    for (let i = first; i < last; i++) {
      let row = this.there.get(i);
      if (!row) {
        row = this.rowAt(i);
        row.style.transform = `translateY(${i * ROW}px)`;
        this.there.set(i, row);
        this.space.append(row);
      }
      row.classList.toggle("chosen", i === chosen);
    }
  }

  bringUp(i, count) { // scroll so that a row is seen; returns its number, which is one that there is
    const chosen = Math.max(0, Math.min(count - 1, i));
    const top = chosen * ROW;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    if (top + ROW > this.box.scrollTop + this.box.clientHeight) this.box.scrollTop = top + ROW - this.box.clientHeight;
    return chosen;
  }
}

function sorted(indices, column, down) {
  // A float's bits, as a whole number that grows with it, and the index behind: one number, sorted without a comparison
  // of ours. NaN stands last, whichever way; equal ones stand by their index.
  const bits = new Uint32Array(column.buffer, column.byteOffset, column.length);
  const packed = new Float64Array(indices.length);
  for (let i = 0; i < indices.length; i++) {
    const f = indices[i];
    const b = bits[f];
    let key = b & 0x80000000 ? ~b >>> 0 : (b | 0x80000000) >>> 0;
    if (Number.isNaN(column[f])) key = 0xffffffff;
    else if (down) key = 0xffffffff - key;
    packed[i] = key * 2097152 + f;
  }
  packed.sort();
  const order = new Uint32Array(packed.length);
  for (let i = 0; i < order.length; i++) order[i] = packed[i] % 2097152;
  return order;
}
