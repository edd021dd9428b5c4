"use strict";
const $ = (id) => document.getElementById(id);
const make = (tag, attributes = {}, ...children) => {
  const svg = ["svg", "rect"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
let token = "";
let model = null;

async function ask(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (token) headers.Authorization = `Bearer ${token}`;
  const response = await fetch(path, { ...options, headers });
  const found = await response.json().catch(() => ({}));
  if (!response.ok) {
    const error = new Error(found.error ? found.error.message : `the service answered ${response.status}`);
    error.status = response.status;
    throw error;
  }
  return found;
}

const figure = (value) => (typeof value === "number" ? Number(value.toPrecision(4)).toString() : value === null ? "–" : JSON.stringify(value));

function field(name, kind) {
  const id = `field-${name}`;
  let control;
  const types = [].concat(kind.type);
  if (types.includes("boolean")) {
    control = make("select", { id }, make("option", { value: "true" }, "true"), make("option", { value: "false" }, "false"), make("option", { value: "null" }, "not known"));
  } else if (types.includes("number")) {
    control = make("input", { id, type: "number", step: "any", value: (kind.examples || [""])[0] });
  } else if (types.includes("string") && kind.examples && !kind.format) {
    control = make("select", { id }, ...kind.examples.map((v) => make("option", { value: JSON.stringify(v) }, v)), make("option", { value: "null" }, "not known"));
  } else {
    control = make("input", { id, type: "date", value: (kind.examples || [""])[0] });
  }
  control.dataset.column = name;
  return make("div", {}, make("label", { for: id }, name), control);
}

function zeros(kind) {
  return kind.type === "array" ? Array.from({ length: kind.minItems }, () => zeros(kind.items)) : kind.type === "boolean" ? false : 0;
}

function body() {
  if (model.row) {
    const row = {};
    for (const control of $("fields").querySelectorAll("[data-column]")) {
      const value = control.value;
      row[control.dataset.column] =
        control.type === "number" ? (value === "" ? null : Number(value)) : control.type === "date" ? value || null : JSON.parse(value);
    }
    return { rows: [row] };
  }
  const rows = {};
  for (const control of $("fields").querySelectorAll("textarea")) rows[control.dataset.input] = [JSON.parse(control.value)];
  return { inputs: model.layout === "tensor" ? Object.values(rows)[0] : rows };
}

function bar(parts, whole) {
  const svg = make("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", role: "img" }, make("rect", { class: "rail", width: 100, height: 8, rx: 1 }));
  let x = 0;
  for (const [kind, value] of parts) {
    const width = whole > 0 ? Math.max(0, Math.min(100 - x, (100 * value) / whole)) : 0;
    svg.append(make("rect", { class: kind, x, width, height: 8, rx: 1 }));
    x += width;
  }
  return svg;
}

function show(found) {
  const p = found.predictions[0];
  const shown = [];
  const classes = found.classes || (Array.isArray(p.probs) ? p.probs.map((_, k) => k) : null);
  if (p.probs !== undefined) {
    shown.push(make("p", { class: "headline" }, String(p.label)));
    shown.push(make("p", { class: "quiet" }, `probability ${figure(p.confidence)}, over ${found.n_samples} draws`));
    const probs = Array.isArray(p.probs) ? p.probs : [1 - p.probs, p.probs];
    const order = probs.map((v, k) => [v, k]).sort((a, b) => b[0] - a[0]).slice(0, 8);
    const bars = make("div", { class: "bars" });
    for (const [value, k] of order) {
      bars.append(make("span", { class: "name" }, String(classes ? classes[k] : k)), bar([["share", value]], 1), make("span", { class: "figure" }, figure(value)));
    }
    shown.push(bars);
  } else {
    const unit = model.target ? ` ${model.target}` : "";
    shown.push(make("p", { class: "headline" }, `${figure(p.mean)} ± ${figure(p.std)}`));
    shown.push(make("p", { class: "quiet" }, `mean and standard deviation${unit ? " of" + unit : ""}, over ${found.n_samples} draws`));
  }
  if (typeof p.total === "number") {
    const unit = p.probs !== undefined ? "nats" : "squared units";
    const most = p.probs !== undefined ? Math.max(p.total, Math.log(classes ? classes.length : 2)) : p.total;
    shown.push(make("p", { class: "quiet" }, `uncertainty, ${unit}`));
    const bars = make("div", { class: "bars" });
    bars.append(make("span", { class: "name" }, "total"), bar([["aleatoric", p.aleatoric], ["epistemic", p.epistemic]], most), make("span", { class: "figure" }, figure(p.total)));
    for (const [kind, said] of [["aleatoric", "noise in the data"], ["epistemic", "what the model does not know"]]) {
      bars.append(make("span", { class: "name" }, make("span", { class: `key ${kind}` }), kind), make("span", { class: "quiet" }, said), make("span", { class: "figure" }, figure(p[kind])));
    }
    shown.push(bars);
  }
  if (p.lower !== undefined) shown.push(make("p", {}, `interval: ${figure(p.lower)} to ${figure(p.upper)}`));
  for (const name of ["sets", "action", "reason", "distance", "risk", "var", "es"]) {
    if (p[name] === undefined || p[name] === null) continue;
    const value = name === "reason" ? p.reason : name === "sets" ? p.sets.join(", ") || "empty" : name === "action" && p.probs !== undefined && p.action === -1 ? "refer to a person" : figure(p[name]);
    shown.push(make("p", {}, `${name === "sets" ? "set" : name}: ${value}`));
  }
  for (const [kind, columns] of Object.entries(found.notes || {})) shown.push(make("p", { class: "quiet" }, `${kind}: ${Object.keys(columns).join(", ")}`));
  $("answer").replaceChildren(...shown);
}

function fail(error) {
  $("answer").replaceChildren(make("p", { class: "error" }, error.message));
}

async function start() {
  try {
    model = await ask("/v1/model");
  } catch (error) {
    if (error.status === 401) {
      $("token-form").hidden = false;
      $("about").textContent = token ? error.message : "This service asks for a token.";
    } else {
      $("about").textContent = error.message;
    }
    return;
  }
  $("token-form").hidden = true;
  document.querySelector("main").hidden = false;
  $("name").textContent = model.name;
  $("about").textContent = `${model.method}, ${model.n_samples} draws${model.target ? `, predicts ${model.target}` : ""}`;
  $("card").textContent = model.card;
  if (model.row) {
    $("fields").replaceChildren(...Object.entries(model.row.properties).map(([name, kind]) => field(name, kind)));
  } else {
    $("fields").className = "wide";
    $("fields").replaceChildren(
      ...model.inputs.map((kind) => {
        const control = make("textarea", { id: `input-${kind.title}`, spellcheck: "false" });
        control.dataset.input = kind.title;
        control.value = JSON.stringify(zeros(kind));
        return make("div", {}, make("label", { for: `input-${kind.title}` }, `input ${kind.title}, one row as JSON`), control);
      }),
    );
  }
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    show(await ask("/v1/predict", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body()) }));
  } catch (error) {
    fail(error);
  }
});
// a link sends no token: what it points to is asked for here, and shown below
for (const link of document.querySelectorAll("footer a")) {
  link.addEventListener("click", async (event) => {
    if (!token) return;
    event.preventDefault();
    const response = await fetch(link.getAttribute("href"), { headers: { Authorization: `Bearer ${token}` } });
    $("linked").textContent = await response.text();
    $("linked").hidden = false;
  });
}
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value;
  start();
});
start();
