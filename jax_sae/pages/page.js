// ---- words ------------------------------------------------------------------------------------------------------------

let words = null;
const wordsAreThere = load("words").then((found) => {
  words = [];
  found.ids.forEach((id, i) => { words[id] = found.words[i]; });
});
const word = (id) => words[id] ?? `<${id}>`;

const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");

function shown(id) { // a token by itself: its spaces and line breaks can be seen
  return make("span", { className: "word", textContent: visible(word(id)) });
}

// ---- notes: kept by the browser, never sent anywhere ------------------------------------------------------------------

const SHELF = `jax_sae notes ${facts.id}`;
let notes = {};
try { notes = JSON.parse(localStorage.getItem(SHELF) ?? "{}"); } catch { say("This browser keeps no notes for this page."); }
const noteOf = (name, f) => notes[name]?.[f] ?? "";

function keepNote(name, f, text) {
  notes[name] ??= {};
  if (text) notes[name][f] = text;
  else delete notes[name][f];
  try { localStorage.setItem(SHELF, JSON.stringify(notes)); } catch { say("This note could not be kept: export it."); }
  state.hay = null;
}

function exportNotes() {
  const content = Object.fromEntries(Object.entries(notes).filter(([, its]) => Object.keys(its).length));
  const file = new Blob([JSON.stringify(content, null, 2) + "\n"], { type: "application/json" });
  const link = make("a", { href: URL.createObjectURL(file), download: "notes.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// ---- state ------------------------------------------------------------------------------------------------------------

const COLUMNS = [
  { key: "index", title: "Feature", down: false },
  { key: "label", title: "Label", down: false },
  { key: "density", title: "Density", show: percent, help: "Of the tokens, the part on which it fires" },
  { key: "maximum", title: "Max", show: number, help: "Its largest value" },
  { key: "f1", title: "Rule F1", show: (x) => (x ? x.toFixed(2) : "–"), help: "How well its rule says when it fires, on other stories" },
  { key: "match", title: "Match", show: (x) => (Number.isNaN(x) ? "–" : x.toFixed(2)), help: "" },
  { key: "mean", title: "Mean", show: number, help: "Its mean value where it fires" },
  { key: "norm", title: "Norm", show: number, help: "Of its decoder direction, in the language model's scale" },
];

const state = {
  member: null, table: null, hay: null, // of the member that is shown
  sort: "index", down: false, found: new Uint32Array(0), order: new Uint32Array(0), chosen: -1, // where in the order
  feature: -1, view: "overview", wanted: 0,
};
const range = { density: [0, Infinity], maximum: [0, Infinity] };

const memberNamed = (name) => facts.members.find((each) => each.name === name);
const labelOf = (f) => state.table.given[f] ?? (state.table.labels[f] || outputLabel(f));
const outputLabel = (f) => (state.table.outputs[f].length ? `raises ${state.table.outputs[f].map((v) => `“${visible(word(v))}”`).join(" ")}` : "");
const link = (member, f) => `#m=${encodeURIComponent(member.name)}&f=${f}`;

async function useMember(member) {
  if (state.member === member && state.table) return;
  state.member = member;
  state.table = null;
  $("member").value = member.name;
  document.documentElement.style.setProperty("--bar", member.colour); // as in figures
  const its = member.seeds.length ? "its mean cosine with the best ones of other seeds" : "its cosine with the best one of any other member";
  COLUMNS.find(({ key }) => key === "match").help = `By decoder direction, ${its}`;
  const [table] = await Promise.all([load(member.table), wordsAreThere]);
  if (state.member !== member) return;
  Object.assign(state, { table, hay: null, chosen: -1 });
  const read = member.reads.length ? `, reads ${member.reads.join(", ")} and writes ${member.writes.join(", ")}` : "";
  const place = !member.reads.length && member.writes[0] ? ` at ${member.writes.join(", ")}` : "";
  $("about").textContent =
    `${member.features.toLocaleString("en")} features, ${member.kind}${place}${read}, of ${facts.run} at step ${facts.step.toLocaleString("en")}. ` +
    `Seen on ${facts.tokens.toLocaleString("en")} tokens of ${facts.stories.toLocaleString("en")} stories (${facts.text}): ` +
    `${number(member.active)} active on a token, ${member.dead.toLocaleString("en")} dead` +
    `${member.fvu === null ? "" : `, FVU ${number(member.fvu)}`}.`;
  fillHead();
  refresh();
}

// ---- sorting and filtering --------------------------------------------------------------------------------------------

function columnOf(key) { // numbers, by which the table is sorted
  const { table, member } = state;
  if (key === "index") {
    const column = new Float32Array(member.features);
    for (let f = 0; f < column.length; f++) column[f] = f;
    return column;
  }
  return table[key === "label" ? "rank" : key];
}

async function haystacks() { // of each feature, in small letters, all by which it can be found
  if (!state.hay) {
    const { member, table } = state;
    const hay = new Array(member.features);
    for (const [first, name] of member.search) {
      const found = await load(name);
      for (let i = 0; i < found.ids.length / found.columns; i++) {
        const ids = found.ids.subarray(i * found.columns, (i + 1) * found.columns);
        const f = first + i;
        const texts = Array.from(ids, (id) => (id ? word(id - 1) : ""));
        hay[f] = [f, table.given[f] ?? "", table.labels[f], outputLabel(f), noteOf(member.name, f), ...texts].join("\u0001").toLowerCase();
      }
    }
    if (state.member === member) state.hay = hay;
  }
  return state.hay;
}

async function filtered() {
  const { member, table } = state;
  const F = member.features;
  const wanted = $("search").value.toLowerCase();
  const show = $("show").value;
  const hay = wanted ? await haystacks() : null;
  if (state.member !== member) return null;
  const tests = {
    alive: (f) => table.maximum[f] > 0,
    dead: (f) => table.maximum[f] === 0,
    dense: (f) => table.density[f] > 0.1,
    labelled: (f) => labelOf(f) !== "",
    noted: (f) => noteOf(member.name, f) !== "",
  };
  const [d0, d1] = range.density;
  const [m0, m1] = range.maximum;
  const found = new Uint32Array(F);
  let n = 0;
  for (let f = 0; f < F; f++) {
    if (tests[show] && !tests[show](f)) continue;
    if (table.density[f] < d0 || table.density[f] > d1 || table.maximum[f] < m0 || table.maximum[f] > m1) continue;
    if (hay && !hay[f].includes(wanted)) continue;
    found[n++] = f;
  }
  return found.subarray(0, n);
}

async function refresh() {
  if (!state.table) return;
  const asked = ++state.wanted;
  const indices = await filtered();
  if (asked !== state.wanted || !indices) return;
  state.found = indices;
  arrange();
  drawScatter();
}

function arrange() { // what was found, in the order that is asked for
  const indices = state.found;
  const before = state.order[state.chosen];
  state.order = sorted(indices, columnOf(state.sort), state.down);
  state.chosen = before === undefined ? -1 : state.order.indexOf(before);
  $("count").textContent = `${indices.length.toLocaleString("en")} of ${state.member.features.toLocaleString("en")}`;
  for (const cell of $("head").children) {
    const on = cell.dataset.key === state.sort;
    cell.setAttribute("aria-sort", on ? (state.down ? "descending" : "ascending") : "none");
    const { title } = COLUMNS.find(({ key }) => key === cell.dataset.key);
    cell.firstChild.textContent = title + (on ? (state.down ? " ↓" : " ↑") : "");
  }
  $("table").setAttribute("aria-rowcount", indices.length + 1);
  $("rows").scrollTop = 0;
  drawRows(true);
}

function sortBy(key) {
  if (state.sort === key) state.down = !state.down;
  else Object.assign(state, { sort: key, down: COLUMNS.find((column) => column.key === key).down ?? true });
  if (state.table) arrange();
}

// ---- the table: as many rows as can be seen ----------------------------------------------------------------------------

function fillHead() {
  $("head").replaceChildren(
    ...COLUMNS.map(({ key, title, help }) => {
      const button = make("button", { type: "button", textContent: title, title: help ?? "", onclick: () => sortBy(key) });
      const cell = make("div", { role: "columnheader" }, button);
      cell.dataset.key = key;
      return cell;
    }),
  );
}

const rows = new Rows($("rows"), $("space"), rowAt);

function drawRows(anew = false) {
  if (state.table) rows.draw(state.order.length, state.chosen, anew);
}

function rowAt(i) {
  const { order, table, member } = state;
  const f = order[i];
  const note = noteOf(member.name, f);
  const name = make("a", { href: link(member, f), textContent: f, tabIndex: -1 });
  const label = table.maximum[f] ? labelOf(f) : "dead";
  const row = make("div", { role: "row", className: "row", ariaRowindex: i + 2 },
    make("span", { role: "cell" }, name),
    make("span", { role: "cell", textContent: label + (note ? `  ✎ ${note}` : ""), title: label, className: table.maximum[f] ? "" : "dead" }),
    ...COLUMNS.slice(2).map(({ key, show }) => make("span", { role: "cell", textContent: show(table[key][f]) })));
  row.onclick = () => { location.hash = link(member, f); };
  return row;
}

function choose(i) {
  state.chosen = rows.bringUp(i, state.order.length);
  drawRows();
}

// ---- the scatter -------------------------------------------------------------------------------------------------------

const scatter = { bounds: null, drag: null };
const BARS_A_DECADE = 4;

function drawDensities() { // how many features have which density; a click on a bar chooses it
  const { table, order, member } = state;
  const counts = new Map(); // bar -> how many of all, of those that are chosen
  const count = (f, which) => {
    if (!table.maximum[f]) return;
    const bar = Math.floor(Math.log10(table.density[f]) * BARS_A_DECADE);
    if (!counts.has(bar)) counts.set(bar, [0, 0]);
    counts.get(bar)[which]++;
  };
  for (let f = 0; f < member.features; f++) count(f, 0);
  for (const f of order) count(f, 1);
  if (!counts.size) { $("densities").replaceChildren(); return; }
  const bars = [...counts.keys()];
  const [first, last] = [Math.min(...bars), Math.max(...bars)];
  const most = Math.max(...[...counts.values()].map(([all]) => all));
  const [W, H, bottom] = [Math.max(240, $("densities").clientWidth), 70, 16];
  const edge = (bar) => 10 ** (bar / BARS_A_DECADE);
  const across = (bar) => 44 + ((bar - first) / (last + 1 - first)) * (W - 56);
  const peak = bars.find((bar) => counts.get(bar)[0] === most);
  const picture = drawn("svg", { class: "histogram densities", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label":
    `Histogram of densities, ${BARS_A_DECADE} bars a power of ten: most features, ${most.toLocaleString("en")}, fire on ${percent(edge(peak))} to ${percent(edge(peak + 1))} of the tokens; ${member.dead.toLocaleString("en")} never fired.` });
  for (const bar of bars) {
    const [all, chosen] = counts.get(bar);
    const height = (n) => Math.max(n ? 1 : 0, (n / most) * (H - bottom - 4));
    const group = drawn("g", {}, drawn("title", {}, `${percent(edge(bar))} to ${percent(edge(bar + 1))} of the tokens: ${all.toLocaleString("en")} features`),
      ...[[all, "all"], [chosen, "chosen"]].map(([n, name]) => drawn("rect", { class: name, x: across(bar), y: H - bottom - height(n), width: Math.max(1, across(bar + 1) - across(bar) - 1), height: height(n) })));
    group.onclick = () => chooseRange([edge(bar), edge(bar + 1)], range.maximum);
    picture.append(group);
  }
  for (const tick of ticks(first / BARS_A_DECADE, (last + 1) / BARS_A_DECADE)) {
    picture.append(drawn("text", { x: across(Math.log10(tick) * BARS_A_DECADE), y: H - 3, "text-anchor": "middle" }, percent(tick)));
  }
  picture.append(drawn("text", { x: 38, y: 12, "text-anchor": "end" }, most.toLocaleString("en")));
  $("densities").replaceChildren(picture);
}

function drawScatter() {
  const canvas = $("scatter");
  const { table, order, member } = state;
  const [W, H] = [canvas.clientWidth, canvas.clientHeight];
  if (!table || !W) return;
  if (!scatter.drag) drawDensities();
  const scale = devicePixelRatio || 1;
  Object.assign(canvas, { width: W * scale, height: H * scale });
  const paint = canvas.getContext("2d");
  paint.scale(scale, scale);
  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  for (let f = 0; f < member.features; f++) {
    if (!table.maximum[f]) continue;
    const [x, y] = [Math.log10(table.density[f]), Math.log10(table.maximum[f])];
    x0 = Math.min(x0, x); x1 = Math.max(x1, x); y0 = Math.min(y0, y); y1 = Math.max(y1, y);
  }
  if (x0 > x1) return;
  const margin = { left: 44, right: 12, top: 10, bottom: 24 };
  [x0, x1] = [Math.floor(x0 * BARS_A_DECADE) / BARS_A_DECADE, (Math.floor(x1 * BARS_A_DECADE) + 1) / BARS_A_DECADE]; // whole bars of the histogram below, which has the same axis
  const pad = (y1 - y0) * 0.06 + 0.02;
  const bounds = { x0, x1, y0: y0 - pad, y1: y1 + pad, margin, W, H };
  scatter.bounds = bounds;
  const style = getComputedStyle(document.documentElement);
  const across = (x) => margin.left + ((x - bounds.x0) / (bounds.x1 - bounds.x0)) * (W - margin.left - margin.right);
  const up = (y) => H - margin.bottom - ((y - bounds.y0) / (bounds.y1 - bounds.y0)) * (H - margin.top - margin.bottom);
  paint.font = "11px system-ui, sans-serif";
  paint.fillStyle = style.getPropertyValue("--soft");
  paint.strokeStyle = style.getPropertyValue("--line");
  paint.textAlign = "center";
  for (const tick of ticks(bounds.x0, bounds.x1)) {
    const x = across(Math.log10(tick));
    paint.fillText(percent(tick), x, H - 8);
    paint.beginPath(); paint.moveTo(x, margin.top); paint.lineTo(x, H - margin.bottom); paint.stroke();
  }
  paint.textAlign = "right";
  for (const tick of ticks(bounds.y0, bounds.y1)) {
    const y = up(Math.log10(tick));
    paint.fillText(number(tick), margin.left - 6, y + 4);
    paint.beginPath(); paint.moveTo(margin.left, y); paint.lineTo(W - margin.right, y); paint.stroke();
  }
  const inside = new Uint8Array(member.features);
  for (const f of order) inside[f] = 1;
  const size = member.features > 5000 ? 2 : 4;
  for (const on of [0, 1]) {
    paint.fillStyle = style.getPropertyValue(on ? "--bar" : "--line");
    for (let f = 0; f < member.features; f++) {
      if (inside[f] !== on || !table.maximum[f]) continue;
      paint.fillRect(across(Math.log10(table.density[f])) - size / 2, up(Math.log10(table.maximum[f])) - size / 2, size, size);
    }
  }
  if (scatter.drag) {
    const [[a, b], [c, d]] = scatter.drag;
    paint.strokeStyle = style.getPropertyValue("--link");
    paint.strokeRect(Math.min(a, c), Math.min(b, d), Math.abs(c - a), Math.abs(d - b));
  }
}

function valueAt([x, y]) { // density and maximum at a pixel
  const { x0, x1, y0, y1, margin, W, H } = scatter.bounds;
  return [
    10 ** (x0 + ((x - margin.left) / (W - margin.left - margin.right)) * (x1 - x0)),
    10 ** (y0 + ((H - margin.bottom - y) / (H - margin.top - margin.bottom)) * (y1 - y0)),
  ];
}

function chooseRange(density, maximum) {
  Object.assign(range, { density, maximum });
  for (const [name, [from, to]] of Object.entries(range)) {
    $(`${name}-from`).value = from > 0 ? number(from) : "";
    $(`${name}-to`).value = Number.isFinite(to) ? number(to) : "";
  }
  return refresh();
}

function listenToScatter() {
  const canvas = $("scatter");
  const at = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  canvas.onpointerdown = (event) => {
    if (!scatter.bounds) return;
    canvas.setPointerCapture(event.pointerId);
    scatter.drag = [at(event), at(event)];
  };
  canvas.onpointermove = (event) => {
    if (!scatter.drag) return;
    scatter.drag[1] = at(event);
    drawScatter();
  };
  canvas.onpointerup = () => {
    const drag = scatter.drag;
    scatter.drag = null;
    if (!drag) return;
    const [a, b] = drag.map(valueAt);
    const [[x, y], [z, w]] = drag;
    if (Math.abs(x - z) < 4 || Math.abs(y - w) < 4) { chooseRange([0, Infinity], [0, Infinity]); return; }
    chooseRange([Math.min(a[0], b[0]), Math.max(a[0], b[0])], [Math.min(a[1], b[1]), Math.max(a[1], b[1])]);
  };
  for (const name of ["density", "maximum"]) {
    for (const [i, end] of ["from", "to"].entries()) {
      $(`${name}-${end}`).onchange = ({ target }) => {
        const value = target.value.trim() === "" ? [0, Infinity][i] : Number(target.value);
        if (Number.isNaN(value)) { say(`“${target.value}” is no number.`); return; }
        range[name][i] = value;
        refresh();
      };
    }
  }
}

// ---- a feature ---------------------------------------------------------------------------------------------------------

async function showFeature(f) {
  const { member, table } = state;
  const [first, , name] = member.blocks.find(([from, to]) => f >= from && f < to);
  const found = await load(name, false);
  if (state.feature !== f || state.member !== member || state.view !== "feature") return;
  const its = found.features[f - first];
  const place = state.order.indexOf(f);
  if (place >= 0) choose(place);
  const step = (by) => {
    const to = place < 0 ? f + by : state.order[place + by];
    const button = make("a", { textContent: by < 0 ? "← previous" : "next →" });
    if (to === undefined || to < 0 || to >= member.features) return "";
    button.href = link(member, to);
    return button;
  };
  const heading = make("h2", { textContent: `Feature ${f}`, tabIndex: -1 });
  const parts = [
    make("header", {}, heading, make("span", { className: "quiet", textContent: `of ${member.name}` }), step(-1), step(1)),
    labelsOf(f, its),
    factsOf(f, its),
    commandFor(f),
    noteFor(f),
  ];
  if (table.maximum[f]) {
    parts.push(
      make("div", { className: "columns" }, section("How large it is", histogram(its)), section("Tokens on which it fires", tokensOn(its)),
        section("Tokens before these", tokensBefore(its))),
      ...examplesOf(f, first, its, found),
    );
  } else {
    parts.push(make("p", { textContent: `It never fired on the ${facts.tokens.toLocaleString("en")} tokens that were read, so there are no examples. It may be dead, or wait for a text of another kind.` }));
  }
  parts.push(...lensesOf("Tokens that it raises and lowers", "writes", its.lens), ...lensesOf("Tokens that its encoder looks for", "reads", its.reads));
  parts.push(make("div", { className: "columns" }, ...likeIt(its)));
  $("feature").replaceChildren(...parts.filter(Boolean));
  document.title = `Feature ${f} of ${member.name}`;
  heading.focus({ preventScroll: true });
  scrollTo(0, 0);
}

function labelsOf(f, its) {
  const list = make("ul", { className: "labels" });
  const given = state.table.given[f];
  if (given !== undefined) list.append(make("li", {}, make("strong", { textContent: given }), make("span", { className: "quiet", textContent: "  a label from elsewhere" })));
  for (const [text, precision, recall] of its.rules) {
    list.append(make("li", {}, make("span", { className: given === undefined && !list.children.length ? "first" : "", textContent: text }),
      make("span", { className: "quiet", textContent: `  a rule: precision ${precision.toFixed(2)}, recall ${recall.toFixed(2)} on other stories` })));
  }
  const out = outputLabel(f);
  if (out) list.append(make("li", {}, make("span", { textContent: out }), make("span", { className: "quiet", textContent: "  by its logits, which are peaked" })));
  if (!list.children.length) list.append(make("li", { className: "quiet", textContent: "No rule about tokens says when it fires." }));
  return list;
}

function factsOf(f, its) {
  const { table } = state;
  const list = make("dl", { className: "facts" });
  const add = (name, value) => list.append(make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })));
  add("fires on", `${percent(table.density[f])} of the tokens (${its.fired.toLocaleString("en")})${its.dense ? ", dense" : ""}${its.fired ? "" : ", dead"}`);
  add("maximum", number(table.maximum[f], 4));
  add("mean where it fires", number(table.mean[f], 4));
  add("decoder norm", number(table.norm[f], 4));
  add("fires on a story's first token", `${percent(its.at_first)} of the times`);
  add(state.member.seeds.length ? "match in other seeds" : "best match in other members", number(table.match[f], 2));
  return list;
}

function commandFor(f) {
  if (!facts.model) return ""; // the run read activations, so it has no language model to push
  const text = `jax-sae steer ${quoted(facts.run)} --member ${quoted(state.member.name)} --feature ${f} --strength ${number(2 * state.table.maximum[f] || 1, 2)} --prompt "Once upon a time"`;
  const copy = make("button", { type: "button", textContent: "Copy", onclick: async () => {
    try { await navigator.clipboard.writeText(text); say("Copied."); }
    catch { getSelection().selectAllChildren(code); say("Press Ctrl+C to copy what is selected."); }
  } });
  const code = make("code", { textContent: text });
  return make("p", { className: "command" }, "Push the model with it: ", code, copy);
}

const quoted = (text) => (/^[\w./:+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

function noteFor(f) {
  const { name } = state.member;
  const area = make("textarea", { id: "note", value: noteOf(name, f), placeholder: "A note, kept by this browser" });
  area.oninput = () => keepNote(name, f, area.value.trim());
  return make("p", {}, make("label", { htmlFor: "note", className: "quiet", textContent: "Note" }), area);
}

function histogram(its) {
  const [first, ...bars] = its.bars;
  const [W, H, left, bottom] = [320, 130, 34, 18];
  const most = Math.log10(Math.max(...bars) + 1);
  const width = (W - left) / bars.length;
  const picture = drawn("svg", { class: "histogram", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label":
    `Histogram of its values, from ${number(facts.bars[first])} to ${number(facts.bars[first + bars.length])}, four bars an octave, counts logarithmic.` });
  for (let e = 0; 10 ** e <= 10 ** most; e += most > 4 ? 2 : 1) {
    const y = H - bottom - (Math.log10(10 ** e + 1) / most) * (H - bottom - 8);
    picture.append(drawn("line", { x1: left, x2: W, y1: y, y2: y }), drawn("text", { x: left - 4, y: y + 3, "text-anchor": "end" }, (10 ** e).toLocaleString("en")));
  }
  bars.forEach((count, i) => {
    const height = (Math.log10(count + 1) / most) * (H - bottom - 8);
    const title = drawn("title", {}, `${number(facts.bars[first + i])} to ${number(facts.bars[first + i + 1])}: ${count.toLocaleString("en")} tokens`);
    picture.append(drawn("rect", { x: left + i * width, y: H - bottom - height, width: Math.max(1, width - 1), height }, title));
  });
  for (const i of new Set([0, Math.floor(bars.length / 2), bars.length])) {
    const anchor = i === 0 ? "start" : i === bars.length ? "end" : "middle";
    picture.append(drawn("text", { x: left + i * width, y: H - 5, "text-anchor": anchor }, number(facts.bars[first + i])));
  }
  return picture;
}

const tokensOn = (its) => tableOf(["token", "of its mass", "fires on"], its.on.map(([v, mass, fired, seen]) => [shown(v), percent(mass), `${fired.toLocaleString("en")} of ${seen.toLocaleString("en")}`]));
const tokensBefore = (its) => (its.after.length ? tableOf(["token", "of the times"], its.after.map(([v, part]) => [shown(v), percent(part)])) : make("p", { className: "quiet", textContent: "None: it fires on first tokens alone." }));

function lensesOf(title, how, lenses) {
  return Object.entries(lenses).map(([place, { up, down, sd, kurtosis }]) => {
    const [randomSd, randomKurtosis, randomTop] = state.member.random[how][place];
    const side = (name, pairs) => {
      const table = tableOf(["token", how === "reads" ? "product" : "logit", "in sd"], pairs.map(([v, x]) => [shown(v), number(x), number(x / sd, 2)]));
      table.ariaLabel = `${title}: ${name}`;
      return make("div", {}, make("h4", { textContent: name }), table);
    };
    const top = up[0][1] / sd;
    const means = top > 1.5 * randomTop || kurtosis > 2 * randomKurtosis ? "A few tokens stand out." : "No token stands out: most of these are chance.";
    return section(Object.keys(lenses).length > 1 ? `${title}, from ${place}` : title, make("p", { className: "quiet", textContent:
      (how === "reads" ? `Its direction at ${place} beside the tokens' embeddings; what blocks before it do is not in this. `
        : `By its direction alone at ${place}, through the final norm and the unembedding; what blocks after it do is not in this. `) +
      `Standard deviation over the vocabulary ${number(sd)} (of random directions ${number(randomSd)}), kurtosis ${number(kurtosis)} (${number(randomKurtosis)}), the highest at ${number(top, 2)} standard deviations (${number(randomTop, 2)}). ${means}` }),
    make("div", { className: "columns" }, side(how === "reads" ? "most" : "raised", up), side(how === "reads" ? "least" : "lowered", down)));
  });
}

function likeIt(its) {
  const { member, table } = state;
  const here = (f) => make("span", {}, make("a", { href: link(member, f), textContent: f }), ` ${table.maximum[f] ? labelOf(f) : "dead"}`);
  const found = [section("Nearest by direction", tableOf(["feature", "cosine"], its.nearest.map(([f, cosine]) => [here(f), cosine.toFixed(2)])))];
  if (its.together === null) found.push(section("Fires together with", make("p", { className: "quiet", textContent: "Not counted for so many features." })));
  else if (its.together.length) found.push(section("Fires together with", tableOf(["feature", "phi"], its.together.map(([f, phi]) => [here(f), phi.toFixed(2)]))));
  if (its.matches.length) {
    const lines = its.matches.slice(0, 12).map(([name, f, cosine, isSeed]) => {
      const other = memberNamed(name);
      const text = `${name} ${f}${isSeed ? " (another seed)" : ""}`;
      return [other ? make("a", { href: link(other, f), textContent: text }) : text, cosine.toFixed(2)];
    });
    found.push(section("Best match in other members", tableOf(["member and feature", "cosine"], lines)));
  }
  return found;
}

function examplesOf(f, first, its, found) {
  const groups = new Map();
  for (let e = found.start[f - first]; e < found.start[f - first + 1]; e++) {
    const group = found.group[e];
    if (!groups.has(group)) groups.set(group, []);
    groups.get(group).push(example(f, e, found));
  }
  const edges = [state.table.maximum[f], ...its.edges, 0];
  return [...groups].map(([group, examples]) => {
    const title = group === 0 ? "Where it is largest" : `A sample of values from ${number(edges[group])} to ${number(edges[group - 1])}`;
    const box = section(title, ...examples);
    box.className = "examples";
    return box;
  });
}

function example(f, e, found) {
  const maximum = state.table.maximum[f];
  const width = found.window.length / found.group.length;
  const left = width - 32; // 64 tokens before, 31 after
  const excerpt = found.excerpt[e];
  const [begin, end] = [found.excerpt_start[excerpt], found.excerpt_start[excerpt + 1]];
  const peak = found.position[e] - found.excerpt_first[excerpt];
  const text = make("div", { className: "text" });
  const fill = (whole) => {
    const from = whole ? 0 : Math.max(0, peak - 24);
    const to = whole ? end - begin : Math.min(end - begin, peak + 13);
    text.replaceChildren();
    if (from > 0 || found.excerpt_first[excerpt]) text.append("… ");
    for (let t = from; t < to; t++) {
      const at = t - peak + left;
      const known = at >= 0 && at < width;
      const value = t === peak ? found.value[e] : known ? (found.window[e * width + at] / 255) * maximum : 0;
      const said = word(found.excerpt_ids[begin + t]);
      const token = make(t === peak ? "mark" : "span", { textContent: whole ? said : visible(said) });
      if (value) {
        token.title = number(value);
        token.style.setProperty("--a", (0.12 + 0.88 * Math.min(1, value / maximum)).toFixed(2));
      } else if (!known) token.className = "beyond";
      text.append(token);
    }
    if (to < end - begin) text.append(" …");
  };
  const said = `${number(found.value[e])} on ${visible(word(found.excerpt_ids[begin + peak]))}: the whole story, or less of it`;
  const button = make("button", { type: "button", textContent: number(found.value[e]), title: said, ariaLabel: said, ariaExpanded: "false" });
  button.onclick = () => {
    const whole = button.getAttribute("aria-expanded") === "false";
    button.setAttribute("aria-expanded", whole);
    fill(whole);
  };
  text.onclick = () => { if (getSelection().isCollapsed) button.onclick(); };
  fill(false);
  return make("div", { className: "example" }, button, text);
}

// ---- stories -----------------------------------------------------------------------------------------------------------

async function showStory(n) {
  const { member, table } = state;
  const found = await load(member.stories);
  if (state.view !== "stories" || state.member !== member) return;
  const count = found.start.length - 1;
  n = Math.max(0, Math.min(count - 1, n));
  const pick = make("select", { ariaLabel: "Story" });
  for (let i = 0; i < count; i++) {
    const beginning = Array.from(found.ids.subarray(found.start[i], Math.min(found.start[i + 1], found.start[i] + 12)), word).join("").trim();
    pick.append(make("option", { value: i, textContent: `${i < found.own ? "Your text" : `Story ${i - found.own}`}: ${beginning.replace(/\s+/g, " ")}…` }));
  }
  pick.value = n;
  pick.onchange = () => { location.hash = `#m=${encodeURIComponent(member.name)}&v=stories&s=${pick.value}`; };
  const [begin, end, C] = [found.start[n], found.start[n + 1], found.columns];
  const text = make("div", { className: "text", role: "group", ariaLabel: "The story's tokens: arrows move, and the features active on each are told beside" });
  const aside = make("aside", { ariaLive: "polite" });
  const best = new Map(); // feature -> its largest value in the story, as a part of its maximum
  const partAt = (t, c) => Math.min(1, found.value[t * C + c] / (table.maximum[found.feature[t * C + c]] || found.value[t * C + c]));
  const buttons = [];
  for (let t = begin; t < end; t++) {
    for (let c = 0; c < C; c++) {
      const f = found.feature[t * C + c];
      if (found.value[t * C + c]) best.set(f, Math.max(best.get(f) ?? 0, partAt(t, c)));
    }
    const said = visible(word(found.ids[t])).trim() || "a space";
    const button = make("span", { role: "button", textContent: word(found.ids[t]), ariaLabel: said, tabIndex: t === begin ? 0 : -1, ariaPressed: "false" });
    button.onclick = () => tell(t);
    buttons.push(button);
  }
  const shade = (f) => { // by one feature; by the one nearest to its maximum where none is said
    buttons.forEach((button, i) => {
      let part = 0;
      for (let c = 0; c < C; c++) {
        const at = (begin + i) * C + c;
        if (found.value[at] && (f === null || found.feature[at] === f)) part = Math.max(part, partAt(begin + i, c));
      }
      button.style.setProperty("--a", part ? (f === null ? 0.9 * part ** 4 : 0.12 + 0.88 * part).toFixed(2) : "0");
    });
    for (const each of summary.querySelectorAll("button")) each.setAttribute("aria-pressed", Number(each.value) === f);
  };
  const tell = (t) => {
    buttons.forEach((button, i) => { button.setAttribute("aria-pressed", i === t - begin); button.tabIndex = i === t - begin ? 0 : -1; });
    const lines = [];
    for (let c = 0; c < C; c++) {
      const [f, value] = [found.feature[t * C + c], found.value[t * C + c]];
      if (value) lines.push([make("span", {}, make("a", { href: link(member, f), textContent: f }), ` ${labelOf(f)}`), number(value), table.maximum[f] ? percent(value / table.maximum[f]) : "–"]);
    }
    const active = tableOf(["feature", "value", "of its max"], lines);
    active.ariaLabel = `Active on ${visible(word(found.ids[t]))}`;
    aside.replaceChildren(make("h3", {}, "Active on ", shown(found.ids[t])),
      lines.length ? active : make("p", { className: "quiet", textContent: "None." }));
  };
  text.onkeydown = (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const to = buttons.indexOf(document.activeElement) + (by ?? NaN);
    if (!buttons[to]) return;
    event.preventDefault();
    event.stopPropagation();
    buttons[to].focus();
    tell(begin + to);
  };
  text.onkeyup = ({ key }) => { if (key === "Enter" || key === " ") document.activeElement.click(); };
  text.append(...buttons);
  const strongest = [...best].sort((a, b) => b[1] - a[1]).slice(0, 12);
  const summary = section("Strongest in this story", tableOf(["feature", "of its max", "shading"], strongest.map(([f, part]) => [
    make("span", {}, make("a", { href: link(member, f), textContent: f }), ` ${labelOf(f)}`), percent(part),
    make("button", { type: "button", value: f, textContent: "shade", ariaPressed: "false", title: "Shade the story by this feature alone",
      onclick: ({ target }) => shade(target.getAttribute("aria-pressed") === "true" ? null : f) })])));
  $("stories").replaceChildren(make("p", {}, make("label", {}, "Story ", pick)),
    make("p", { className: "quiet", textContent: `Shaded where a feature is near its maximum. Of each token the ${C} largest features are kept; the arrow keys go from one to the next.` }),
    make("div", { className: "story" }, make("div", {}, text, summary), aside));
  shade(null);
  tell(begin);
  document.title = `Stories of ${member.name}`;
}

// ---- where one is: the part of the address behind # ----------------------------------------------------------------------

async function route() {
  const asked = new URLSearchParams(location.hash.slice(1));
  if (location.hash && ![...asked.keys()].some((key) => "mfvs".includes(key))) return;
  const name = asked.get("m") ?? state.member?.name ?? facts.members[0].name;
  const member = memberNamed(name);
  say("");
  if (!member) { say(`There is no member ${name} on these pages.`); return; }
  state.view = asked.has("f") ? "feature" : asked.get("v") === "stories" ? "stories" : "overview";
  state.feature = asked.has("f") ? Number(asked.get("f")) : -1;
  if (state.view === "feature" && !(Number.isInteger(state.feature) && state.feature >= 0 && state.feature < member.features)) {
    say(`There is no feature ${asked.get("f")}; ${name} has 0 to ${member.features - 1}.`);
    state.view = "overview";
  }
  for (const view of ["overview", "feature", "stories"]) $(view).hidden = view !== state.view;
  for (const view of ["overview", "stories"]) {
    $(`to-${view}`).href = `#m=${encodeURIComponent(name)}&v=${view}`;
    if (view === state.view) $(`to-${view}`).setAttribute("aria-current", "page");
    else $(`to-${view}`).removeAttribute("aria-current");
  }
  document.title = facts.title;
  try {
    await useMember(member);
    if (state.view === "feature") await showFeature(state.feature);
    else if (state.view === "stories") await showStory(Number(asked.get("s") ?? 0) || 0);
    else { drawRows(true); drawScatter(); choose(state.chosen < 0 ? 0 : state.chosen); }
    document.documentElement.dataset.ready = location.hash || "#";
  } catch (error) {
    say(`This part could not be shown: ${error.message}`);
  }
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.key === "Escape") {
    if (typing) event.target.blur();
    else if (state.view !== "overview") location.hash = $("to-overview").hash;
    return;
  }
  if (typing && !(event.target === $("search") && ["ArrowDown", "Enter"].includes(event.key))) return;
  const by = { j: 1, ArrowDown: 1, ArrowRight: 1, k: -1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
  if (event.key === "/") {
    if (state.view !== "overview") location.hash = $("to-overview").hash;
    $("search").focus();
    $("search").select();
  } else if (event.key === "s" && state.view === "overview") {
    const next = COLUMNS[(COLUMNS.findIndex(({ key }) => key === state.sort) + 1) % COLUMNS.length];
    sortBy(next.key);
  } else if (event.key === "Enter" && state.view === "overview" && /^(BODY|DIV|INPUT)$/.test(event.target.tagName)) {
    if (state.order.length) location.hash = link(state.member, state.order[Math.max(0, state.chosen)]);
  } else if (by && state.view === "overview") {
    if (event.target === $("search")) $("rows").focus();
    choose(state.chosen + by);
  } else if (by && state.view === "feature" && !["ArrowUp", "ArrowDown"].includes(event.key)) {
    const to = state.order[state.chosen + by];
    if (to !== undefined) location.hash = link(state.member, to);
  } else return;
  event.preventDefault();
}

function start() {
  $("title").textContent = facts.title;
  $("member").append(...facts.members.map(({ name }) => make("option", { value: name, textContent: name })));
  $("member").onchange = () => {
    const keep = state.view === "stories" ? "stories" : "overview";
    location.hash = `#m=${encodeURIComponent($("member").value)}&v=${keep}`;
  };
  $("search").oninput = () => {
    if (state.view !== "overview") location.hash = $("to-overview").hash;
    refresh();
  };
  $("show").onchange = refresh;
  $("export").onclick = exportNotes;
  $("clear").onclick = () => chooseRange([0, Infinity], [0, Infinity]);
  $("rows").onscroll = () => drawRows();
  addEventListener("resize", () => { drawRows(); drawScatter(); });
  matchMedia("(prefers-color-scheme: dark)").onchange = drawScatter;
  addEventListener("keydown", onKey);
  addEventListener("hashchange", route);
  listenToScatter();
  route();
}

start();
