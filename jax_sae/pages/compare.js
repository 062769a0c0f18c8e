
// ---- state ------------------------------------------------------------------------------------------------------------

const COLUMNS = [
  { key: "index", title: "Feature", down: false },
  { key: "label", title: "Label", down: false },
  { key: "density", title: "Density", help: "Of the tokens, the part on which it fires" },
  { key: "feature", title: "Nearest", down: false, help: "The feature of the other member with the largest cosine of decoder directions" },
  { key: "cosine", title: "Cosine", help: "Of both decoder directions" },
  { key: "other", title: "Label of that", down: false },
  { key: "fires", title: "Fires with", down: false, help: "The feature of the other member whose firing is most correlated with its own" },
  { key: "phi", title: "Phi", help: "The correlation of firing with firing" },
];
const ALIKE = 0.7;
const VIEWS = ["members", "matches", "parts"];

const state = {
  view: "members", a: null, b: null, // members
  of: null, in: null, columns: null, // their tables; of each feature of a, what is known of it in b
  sort: "cosine", down: true, order: new Uint32Array(0), chosen: -1, wanted: 0,
};

const memberNamed = (name) => facts.members.find((each) => each.name === name);
const linkTo = (a, b) => `#v=matches&a=${encodeURIComponent(a.name)}&b=${encodeURIComponent(b.name)}`;
const pageOf = (member, f) => `${facts.pages}#m=${encodeURIComponent(member.name)}&f=${f}`;
const two = (x) => (x === null || x === undefined || Number.isNaN(x) ? "–" : x.toFixed(2));

function named(member, f) { // a feature's number, which leads to its page where there is one
  return facts.pages ? make("a", { href: pageOf(member, f), textContent: f, tabIndex: -1 }) : document.createTextNode(f);
}

// ---- members ----------------------------------------------------------------------------------------------------------

const MARKS = { // by their names in matplotlib; told apart by those who see no colours too
  o: "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0 -5 0Z", s: "M-4.5 -4.5H4.5V4.5H-4.5Z", D: "M0 -6L6 0L0 6L-6 0Z", "^": "M0 -6L6 5H-6Z",
  v: "M0 6L6 -5H-6Z", P: "M-6 -2H-2V-6H2V-2H6V2H2V6H-2V2H-6Z", X: "M-5 -5L5 5M5 -5L-5 5", "<": "M-6 0L5 -6V6Z",
  ">": "M6 0L-5 -6V6Z", p: "M0 -6L5.7 -1.9L3.5 4.9H-3.5L-5.7 -1.9Z",
};

function frontier(members, title) {
  const points = members.filter(({ l0, fvu }) => l0 > 0 && fvu > 0);
  if (!points.length) {
    return make("p", { className: "quiet", textContent: `${title}: FVU is measured at the end of training, or by jax-sae evaluate.` });
  }
  const [W, H] = [680, 380];
  const margin = { left: 68, right: 16, top: 14, bottom: 40 };
  const floors = points.filter(({ pca_fvu }) => pca_fvu > 0).sort((p, q) => p.l0 - q.l0);
  const [xs, ys] = [points.map(({ l0 }) => Math.log10(l0)), [...points.map(({ fvu }) => fvu), ...floors.map((p) => p.pca_fvu)].map(Math.log10)];
  const [x0, x1, y0, y1] = [Math.min(...xs) - 0.1, Math.max(...xs) + 0.1, Math.min(...ys) - 0.06, Math.max(...ys) + 0.06];
  const across = (l0) => margin.left + ((Math.log10(l0) - x0) / (x1 - x0)) * (W - margin.left - margin.right);
  const up = (fvu) => H - margin.bottom - ((Math.log10(fvu) - y0) / (y1 - y0)) * (H - margin.top - margin.bottom);
  const picture = drawn("svg", { class: "frontier", viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": `${title}: FVU against L0, both logarithmic. The table below has the numbers.` });
  for (const tick of ticks(x0, x1)) {
    picture.append(drawn("line", { x1: across(tick), x2: across(tick), y1: margin.top, y2: H - margin.bottom }),
      drawn("text", { x: across(tick), y: H - margin.bottom + 14, "text-anchor": "middle" }, number(tick)));
  }
  for (const tick of ticks(y0, y1)) {
    picture.append(drawn("line", { x1: margin.left, x2: W - margin.right, y1: up(tick), y2: up(tick) }),
      drawn("text", { x: margin.left - 6, y: up(tick) + 4, "text-anchor": "end" }, number(tick)));
  }
  picture.append(drawn("text", { x: (W + margin.left) / 2, y: H - 6, "text-anchor": "middle" }, "L0: features that are active on a token"),
    drawn("text", { transform: `translate(14 ${H / 2}) rotate(-90)`, "text-anchor": "middle" }, "FVU (lower is better)"));
  const path = (line, y) => line.map((p, i) => `${i ? "L" : "M"}${across(p.l0).toFixed(1)} ${up(y(p)).toFixed(1)}`).join("");
  if (floors.length > 1) picture.append(drawn("path", { class: "floor", d: path(floors, (p) => p.pca_fvu) }, drawn("title", {}, "PCA with as many directions")));
  const of = ({ kind, features }) => `${kind} ${features}`;
  const key = make("ul", { className: "key" });
  for (const line of new Set(points.map(of))) { // of one kind and number of features
    const its = points.filter((p) => of(p) === line).sort((p, q) => p.l0 - q.l0);
    const [{ kind, features, colour, marker }] = its;
    picture.append(drawn("path", { class: "line", stroke: colour, d: path(its, (p) => p.fvu) }));
    for (const p of its) {
      const said = `${p.name}: L0 ${number(p.l0)}, FVU ${number(p.fvu)}`;
      const mark = drawn("path", { class: "mark", d: MARKS[marker], fill: colour, stroke: colour, transform: `translate(${across(p.l0).toFixed(1)} ${up(p.fvu).toFixed(1)})` }, drawn("title", {}, said));
      const other = memberNamed(p.others[0]);
      picture.append(other ? drawn("a", { href: linkTo(p, other), "aria-label": said }, mark) : mark);
    }
    const several = points.some((p) => p.kind === kind && p.features !== features);
    key.append(make("li", {}, drawn("svg", { viewBox: "-7 -7 14 14", "aria-hidden": "true" }, drawn("path", { d: MARKS[marker], fill: colour, stroke: colour })),
      several ? `${kind}, F = ${features.toLocaleString("en")}` : kind));
  }
  if (floors.length > 1) key.append(make("li", {}, drawn("svg", { viewBox: "-7 -7 14 14", "aria-hidden": "true" }, drawn("path", { class: "floor", d: "M-7 0H7" })), "PCA with as many directions"));
  return make("figure", { ariaLabel: title }, make("h3", { textContent: title }), picture, key);
}

function showMembers() {
  const places = [...new Set(facts.members.map(({ placement }) => placement))];
  $("frontiers").replaceChildren(...places.map((placement) =>
    frontier(facts.members.filter((each) => each.placement === placement), places.length > 1 ? `Frontier, ${placement}` : "Frontier")));
  const has = (key) => facts.members.some((each) => each[key] !== null && each[key] !== undefined);
  const columns = [
    ...(places.length > 1 ? [["place", ({ placement }) => placement]] : []),
    ["features", ({ features }) => features.toLocaleString("en")],
    ...(has("l0") ? [["L0", ({ l0 }) => number(l0)]] : []),
    ...(has("fvu") ? [["FVU", ({ fvu }) => number(fvu)]] : []),
    ...(has("ce_loss_score_zero_ablation") ? [["loss recovered", (each) => number(each.ce_loss_score_zero_ablation)]] : []),
    [facts.tokens === null ? "without direction" : "never fired", ({ never }) => never.toLocaleString("en")],
    ["of its directions' variance, by parts", ({ meta }) => (meta ? two(meta.explained) : "–")],
    ["of random ones", ({ meta }) => (meta ? two(meta.random) : "–")],
  ];
  $("list").replaceChildren(tableOf(["member", ...columns.map(([title]) => title)], facts.members.map((each) => [
    each.others.length ? make("a", { href: linkTo(each, memberNamed(each.others[0])), textContent: each.name }) : each.name,
    ...columns.map(([, show]) => show(each))])));
  $("list").firstChild.ariaLabel = "All members";
  $("alike-means").textContent =
    `Mean cosine of the features of a line's member${facts.tokens === null ? "" : " that fired"} with the nearest of a column's, by decoder direction: ` +
    "it is not the same the other way round. Of random directions it would be " +
    `${two(Math.min(...Object.values(facts.random)))} to ${two(Math.max(...Object.values(facts.random)))}. A number leads to the features.`;
  const matrix = make("table", { className: "matrix", ariaLabel: "How alike they are" });
  matrix.append(make("thead", {}, make("tr", {}, make("th", { scope: "col", textContent: "in" }), ...facts.members.map(({ name }, i) => make("th", { scope: "col", title: name, textContent: i + 1, ariaLabel: name })))));
  const body = make("tbody");
  facts.members.forEach((each, i) => {
    const line = make("tr", {}, make("th", { scope: "row", textContent: `${i + 1} ${each.name}` }));
    for (const other of facts.members) {
      const n = each.others.indexOf(other.name);
      const value = n < 0 ? null : each.alike[n];
      const cell = make("td", {}, n < 0 ? "" : make("a", { href: linkTo(each, other), textContent: two(value), ariaLabel: `${two(value)}: features of ${each.name} in ${other.name}` }));
      cell.style.setProperty("--a", value === null ? 0 : (0.85 * Math.max(0, value) ** 2).toFixed(2));
      line.append(cell);
    }
    body.append(line);
  });
  matrix.append(body);
  $("alike").replaceChildren(matrix);
  $("seeds").replaceChildren(facts.stability.length
    ? tableOf(["two seeds", "mean cosine, one to one", "of random directions", "mean cosine with the nearest", "of random directions"],
      facts.stability.map((each) => [
        make("a", { href: linkTo(...each.members.map(memberNamed)), textContent: each.members.join(" and ") }),
        two(each.matched_cosine), two(each.null_matched_cosine), two(each.mean_max_cosine), two(each.null_mean_max_cosine)]))
    : make("p", { className: "quiet", textContent: "No two of these members differ in nothing but their seed: train with --sweep.seeds 0 1." }));
  document.title = facts.title;
}

// ---- features of one in another -------------------------------------------------------------------------------------------

async function showMatches(a, b) {
  Object.assign(state, { a, b });
  $("of").value = a.name;
  $("in").replaceChildren(...a.others.map((name) => make("option", { value: name, textContent: name })));
  $("in").value = b.name;
  const [mine, its, found] = await Promise.all([load(a.table), load(b.table), load(a.matches, false)]);
  if (state.a !== a || state.b !== b) return;
  const F = a.features;
  const here = (name) => found[name]?.subarray(a.others.indexOf(b.name) * F, (a.others.indexOf(b.name) + 1) * F);
  const [feature, cosine, fires, phi] = ["feature", "cosine", "fires", "phi"].map(here);
  const alive = (f) => mine.there[f] === 1;
  const columns = {
    index: Float32Array.from({ length: F }, (_, f) => f), label: mine.rank, density: mine.density,
    feature: Float32Array.from(feature), cosine: Float32Array.from(cosine),
    other: Float32Array.from(feature, (g) => its.rank[g]),
    fires: Float32Array.from({ length: F }, (_, f) => (fires && fires[f] ? fires[f] - 1 : NaN)),
    phi: Float32Array.from({ length: F }, (_, f) => (fires && fires[f] ? phi[f] : NaN)),
  };
  Object.assign(state, { of: mine, in: its, columns, alive, same: (f) => Boolean(fires) && fires[f] === feature[f] + 1, chosen: -1 });
  let [there, alike, same, either] = [0, 0, 0, 0];
  for (let f = 0; f < F; f++) {
    if (!alive(f)) continue;
    there++;
    alike += cosine[f] >= ALIKE;
    either += Boolean(fires && fires[f]);
    same += state.same(f);
  }
  $("pair").textContent =
    `Of the ${there.toLocaleString("en")} features of ${a.name}${facts.tokens === null ? "" : " that fired"}, ${alike.toLocaleString("en")} ` +
    `have one in ${b.name} with a cosine of ${ALIKE} or more (of random directions the nearest has ${two(facts.random[b.name])}). ` +
    (fires ? `Of ${either.toLocaleString("en")} that fire with one there, for ${same.toLocaleString("en")} it is the same one that is nearest by direction.`
      : facts.tokens === null ? "The run read activations without a text, so firing together was not counted." : "Firing together was not counted for so many features.");
  const buttons = COLUMNS.map(({ key, title, help }) => {
    const cell = make("div", { role: "columnheader" }, make("button", { type: "button", textContent: title, title: help ?? "", onclick: () => sortBy(key) }));
    cell.dataset.key = key;
    return cell;
  });
  $("head").replaceChildren(...buttons);
  arrange();
  document.title = `${a.name} in ${b.name}`;
}

function arrange() {
  const { a, columns, of, in: its, alive, same } = state;
  const wanted = $("search").value.toLowerCase();
  const show = $("show").value;
  const tests = {
    alike: (f) => alive(f) && columns.cosine[f] >= ALIKE,
    own: (f) => alive(f) && columns.cosine[f] < ALIKE,
    same,
    other: (f) => !Number.isNaN(columns.phi[f]) && !same(f),
    never: (f) => !alive(f),
  };
  const found = [];
  for (let f = 0; f < a.features; f++) {
    if (tests[show] && !tests[show](f)) continue;
    if (wanted && !`${f}\u0001${of.labels[f]}\u0001${its.labels[columns.feature[f]]}`.toLowerCase().includes(wanted)) continue;
    found.push(f);
  }
  const before = state.order[state.chosen];
  state.order = sorted(Uint32Array.from(found), columns[state.sort], state.down);
  state.chosen = before === undefined ? -1 : state.order.indexOf(before);
  $("count").textContent = `${found.length.toLocaleString("en")} of ${a.features.toLocaleString("en")}`;
  for (const cell of $("head").children) {
    const on = cell.dataset.key === state.sort;
    cell.setAttribute("aria-sort", on ? (state.down ? "descending" : "ascending") : "none");
    cell.firstChild.textContent = COLUMNS.find(({ key }) => key === cell.dataset.key).title + (on ? (state.down ? " ↓" : " ↑") : "");
  }
  $("table").setAttribute("aria-rowcount", found.length + 1);
  $("rows").scrollTop = 0;
  drawRows(true);
}

function sortBy(key) {
  if (state.sort === key) state.down = !state.down;
  else Object.assign(state, { sort: key, down: COLUMNS.find((column) => column.key === key).down ?? true });
  if (state.columns) arrange();
}

const rows = new Rows($("rows"), $("space"), rowAt);

function rowAt(i) {
  const { a, b, columns, of, in: its, alive } = state;
  const f = state.order[i];
  const [g, h] = [columns.feature[f], columns.fires[f]];
  const text = (value, left) => make("span", { role: "cell", className: left ? "left" : "", textContent: value, title: left ? value : "" });
  const label = alive(f) ? of.labels[f] : facts.tokens === null ? "no direction" : "never fired";
  return make("div", { role: "row", className: `row${alive(f) ? "" : " dead"}`, ariaRowindex: i + 2 },
    make("span", { role: "cell", className: "left" }, named(a, f)), text(label, true), text(Number.isNaN(of.density[f]) ? "–" : percent(of.density[f])),
    make("span", { role: "cell" }, named(b, g)), text(two(columns.cosine[f])), text(its.labels[g], true),
    make("span", { role: "cell", className: state.same(f) ? "same" : "" }, ...(Number.isNaN(h) ? ["–"] : [named(b, h)])), text(two(columns.phi[f])));
}

function drawRows(anew = false) {
  if (state.columns) rows.draw(state.order.length, state.chosen, anew);
}

// ---- parts that directions share -------------------------------------------------------------------------------------------

async function showParts(member) {
  $("whose").value = member.name;
  document.title = `Parts of the directions of ${member.name}`;
  if (!member.parts) {
    $("parts-mean").textContent = `${member.name} has too few directions for this.`;
    $("parts-list").replaceChildren();
    return;
  }
  const [found, { labels }] = await Promise.all([load(member.parts), load(member.table)]);
  if (state.view !== "parts" || $("whose").value !== member.name) return;
  const { explained, random, l0 } = member.meta;
  const more = explained - random;
  $("parts-mean").textContent =
    `A small batchtopk dictionary was trained on the decoder directions of ${member.name}: one part for every ${facts.meta.fraction} directions, and ${number(l0)} parts in each on average. ` +
    `It explains ${percent(explained)} of their variance, and of that of random directions of the same mean and covariance, by a dictionary of their own, ${percent(random)}. ` +
    (more > 0.02 ? "So directions share parts beyond what their covariance alone gives." : "So they share no parts beyond what their covariance alone gives: read no structure into these groups.");
  const lines = [];
  for (let m = 0; m < found.used.length && found.used[m]; m++) {
    const its = make("span");
    for (let c = 0; c < found.columns; c++) {
      const f = found.feature[m * found.columns + c] - 1;
      if (f < 0) break;
      its.append(...(c ? [", "] : []), named(member, f), ` ${labels[f] || "–"} (${number(found.value[m * found.columns + c], 2)})`);
    }
    lines.push([its, found.used[m].toLocaleString("en")]);
  }
  $("parts-list").replaceChildren(tableOf(["features that have most of a part, and how much", "features that have it"], lines));
}

// ---- where one is: the part of the address behind # ----------------------------------------------------------------------

async function route() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const view = asked.get("v") ?? "members";
  say("");
  const [a, m] = [asked.get("a"), asked.get("m")].map((name) => (name === null ? null : memberNamed(name)));
  if (!VIEWS.includes(view) || a === undefined || m === undefined) { say("There is no such member, or no such view, on this page."); return; }
  state.view = view;
  for (const each of VIEWS) {
    $(each).hidden = each !== view;
    if (each === view) $(`to-${each}`).setAttribute("aria-current", "page");
    else $(`to-${each}`).removeAttribute("aria-current");
  }
  try {
    if (view === "matches") {
      const of = a ?? state.a ?? facts.members.find(({ others }) => others.length);
      if (!of?.others.length) { say("No two of these members write the same places, so none of their features can be compared."); return; }
      const b = memberNamed(of.others.includes(asked.get("b")) ? asked.get("b") : of.others.includes(state.b?.name) ? state.b.name : of.others[0]);
      await showMatches(of, b);
    } else if (view === "parts") await showParts(m ?? memberNamed($("whose").value));
    else showMembers();
    document.documentElement.dataset.ready = location.hash || "#";
  } catch (error) {
    say(`This part could not be shown: ${error.message}`);
  }
}

function swap() {
  if (state.b) location.hash = linkTo(state.b, state.a);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.key === "Escape") {
    if (typing) event.target.blur();
    else location.hash = "#v=members";
    return;
  }
  if (state.view !== "matches" || (typing && !(event.target === $("search") && ["ArrowDown", "Enter"].includes(event.key)))) return;
  const by = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[event.key];
  if (event.key === "/") {
    $("search").focus();
    $("search").select();
  } else if (event.key === "s") {
    sortBy(COLUMNS[(COLUMNS.findIndex(({ key }) => key === state.sort) + 1) % COLUMNS.length].key);
  } else if (event.key === "x") swap();
  else if (event.key === "Enter" && facts.pages && /^(BODY|DIV|INPUT)$/.test(event.target.tagName)) {
    if (state.order.length) location.href = pageOf(state.a, state.order[Math.max(0, state.chosen)]);
  } else if (by) {
    if (event.target === $("search")) $("rows").focus();
    state.chosen = rows.bringUp(state.chosen + by, state.order.length);
    drawRows();
  } else return;
  event.preventDefault();
}

function start() {
  $("title").textContent = facts.title;
  $("about").textContent =
    `${facts.members.length} members of ${facts.run} at step ${facts.step.toLocaleString("en")}. ` +
    (facts.tokens === null ? `They were trained on ${facts.text}, so they are compared by directions alone.`
      : `What fires was counted on ${facts.tokens.toLocaleString("en")} tokens (${facts.text}).`) +
    (facts.pages ? " A feature's number leads to its page." : ` With jax-sae pages ${facts.run}, and this page made again, a feature's number leads to its page.`);
  const options = () => facts.members.map(({ name }) => make("option", { value: name, textContent: name }));
  $("of").append(...options().filter(({ value }) => memberNamed(value).others.length));
  $("whose").append(...options());
  $("of").onchange = () => {
    const a = memberNamed($("of").value);
    location.hash = linkTo(a, memberNamed(a.others.includes($("in").value) ? $("in").value : a.others[0]));
  };
  $("in").onchange = () => { location.hash = linkTo(state.a, memberNamed($("in").value)); };
  $("whose").onchange = () => { location.hash = `#v=parts&m=${encodeURIComponent($("whose").value)}`; };
  $("swap").onclick = swap;
  $("show").onchange = arrange;
  $("search").oninput = arrange;
  $("rows").onscroll = () => drawRows();
  addEventListener("resize", () => drawRows());
  addEventListener("keydown", onKey);
  addEventListener("hashchange", route);
  route();
}

start();
