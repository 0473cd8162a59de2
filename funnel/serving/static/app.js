// The page of `funnel serve`. It talks to the HTTP API on the same server, and to no other host. Everything that comes from
// the user or the server is inserted as text, never as HTML.
"use strict";

// ---------------------------------------------------------------- theme: set before the page is drawn

const systemTheme = matchMedia("(prefers-color-scheme: dark)");

function applyTheme() {
  const theme = localStorage.getItem("funnel-theme") ?? (systemTheme.matches ? "dark" : "light");
  document.documentElement.dataset.theme = theme;
  byId("theme")?.setAttribute("aria-pressed", String(theme === "dark"));
}

applyTheme();
systemTheme.addEventListener("change", applyTheme);

// ---------------------------------------------------------------- helpers

const TOP_LABELS = 10; // shown of a model with more labels
const DENSE_ROW = 60; // a block's row with more positions has no lines between them
const POLL_MILLISECONDS = 400; // between requests for the progress of a file
const RETRY_MILLISECONDS = 2000; // after a failed one

function byId(id) {
  return document.getElementById(id);
}

/** Creates an element. `properties` are set on the element; names with a dash are attributes. Strings become text nodes. */
function create(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

function percent(share) {
  return `${(100 * share).toFixed(1)}%`;
}

function milliseconds(number) {
  return number < 10 ? `${number.toFixed(1)} ms` : `${Math.round(number).toLocaleString("en")} ms`;
}

function sizeOf(bytes) {
  const [size, unit] = bytes < 2 ** 20 ? [bytes / 2 ** 10, "KiB"] : [bytes / 2 ** 20, "MiB"];
  return `${size.toLocaleString("en", { maximumSignificantDigits: 3 })} ${unit}`;
}

function wait(duration) {
  return new Promise((resolve) => setTimeout(resolve, duration));
}

/** Reads a result to users of screen readers. */
function announce(text) {
  byId("announcer").textContent = text;
}

/** Shows an error in the element `id`, and marks the controls that it is about; an empty message clears it. */
function showError(id, message, ...controls) {
  byId(id).textContent = message;
  for (const control of controls) {
    if (message) control.setAttribute("aria-invalid", "true");
    else control.removeAttribute("aria-invalid");
  }
}

// ---------------------------------------------------------------- API

const NO_ANSWER = "The server does not answer. Check that it is running, then try again.";

let tokenRequest = null; // a promise, while the page asks for the token

/** An error response. */
class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Sends a request with the token, which it asks for when the server does. Throws an Error with a message for the user. */
async function request(path, options = {}) {
  for (;;) {
    const token = sessionStorage.getItem("funnel-token");
    const headers = { ...options.headers };
    if (token) headers.Authorization = `Bearer ${token}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      throw error.name === "AbortError" ? error : new Error(NO_ANSWER);
    }
    if (response.ok) return response;
    if (response.status !== 401) throw new ApiError(response.status, await errorMessage(response));
    if (token === sessionStorage.getItem("funnel-token")) await askForToken(token !== null);
  }
}

async function errorMessage(response) {
  try {
    const { detail } = await response.json();
    if (typeof detail === "string") return detail;
  } catch {
    // not JSON: a proxy's error page
  }
  return `The server answered with status ${response.status}.`;
}

function postJson(path, body, signal) {
  return request(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
}

/** Resolves once the user has entered a token. */
function askForToken(wasRejected) {
  if (wasRejected) showError("token-error", "The server did not accept this token.", byId("token"));
  tokenRequest ??= new Promise((resolve) => {
    const form = byId("token-form");
    const focused = document.activeElement;
    form.hidden = false;
    byId("token").focus();
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem("funnel-token", byId("token").value.trim());
      showError("token-error", "", byId("token"));
      byId("token").value = "";
      form.hidden = true;
      tokenRequest = null;
      focused.focus();
      resolve();
    };
  });
  return tokenRequest;
}

// ---------------------------------------------------------------- models

let models = [];
let limits = {};

async function loadModels() {
  byId("loading").hidden = false;
  byId("loading-text").hidden = false;
  byId("reload").hidden = true;
  showError("loading-error", "");
  try {
    ({ models, limits } = await (await request("v1/models")).json());
  } catch (error) {
    byId("loading-text").hidden = true;
    byId("reload").hidden = false;
    showError("loading-error", error.message);
    return;
  }
  byId("loading").hidden = true;
  byId("page").hidden = false;
  byId("model").replaceChildren(...models.map((model) => create("option", { value: model.name }, model.name)));
  byId("second-model").disabled = models.length < 2;
  updateModels();
  updateCount();
}

function selectedModels() {
  const names = [byId("model").value, byId("second-model").value];
  return names.map((name) => models.find((model) => model.name === name)).filter(Boolean);
}

/** Adapts the page to the selected models. */
function updateModels() {
  const [model] = selectedModels();
  listSecondModels(model);
  const second = selectedModels()[1];
  byId("model-facts").textContent = facts(model);
  byId("second-model-facts").textContent = second ? facts(second) : "";

  const pairs = takesPairs();
  const [first, pair] = model.columns.length === 2 ? model.columns : ["First texts", "Second texts"];
  byId("texts-label").textContent = pairs === true ? `${first}, one per line` : "Texts, one per line";
  byId("pairs-label").textContent = pairs === true ? `${pair}, one per line` : "Second texts, one per line (optional)";
  byId("pairs-field").hidden = pairs === false;

  byId("pair-column-field").hidden = model.pairs === false;
  byId("text-column").placeholder = model.columns[0] ?? "";
  byId("pair-column").placeholder = model.columns[1] ?? "";
  byId("file-hint").textContent =
    `Up to ${sizeOf(limits.file_bytes)}. ${model.name} predicts one label per row. ` +
    "Columns are found by name unless you enter others.";
  byId("examples").replaceChildren(...EXAMPLES[pairs === true ? "pairs" : "texts"].map(exampleButton));
}

function listSecondModels(model) {
  const select = byId("second-model");
  const previous = select.value;
  const options = [create("option", { value: "" }, models.length < 2 ? "no other model is served" : "no other model")];
  for (const other of models) {
    if (other === model) continue;
    const fits = model.pairs === null || other.pairs === null || model.pairs === other.pairs;
    const reason = fits ? "" : other.pairs ? " (takes pairs)" : " (takes single texts)";
    options.push(create("option", { value: other.name, disabled: !fits }, other.name + reason));
  }
  select.replaceChildren(...options);
  const kept = options.find((option) => option.value === previous && !option.disabled);
  select.value = kept ? previous : "";
}

/** Whether the selected models take pairs of texts: true, false, or null if either is possible. */
function takesPairs() {
  return selectedModels().map((model) => model.pairs).find((pairs) => pairs !== null) ?? null;
}

function facts(model) {
  const labels = count(model.labels.length, "label");
  const problem = { regression: "regression", "multi-label": `multi-label, ${labels}` }[model.problem] ?? labels;
  const size = `${(model.parameters / 1e6).toFixed(1)} M parameters`;
  const items = [problem, `blocks ${model.blocks}`, size, `up to ${count(model.max_length, "token")}`, engineOf(model)];
  return items.map((item) => item.replaceAll(" ", "\u00a0")).join(" · "); // lines break between items
}

function engineOf({ engine }) {
  return { pytorch: "PyTorch", onnx: "ONNX" }[engine] ?? engine;
}

// ---------------------------------------------------------------- texts

const EXAMPLES = {
  texts: [
    { text: "A warm, funny and beautifully acted film that stays with you long after the credits.", pair: null },
    { text: "The plot makes no sense, the jokes fall flat, and it still takes two hours to end.", pair: null },
  ],
  pairs: [
    { text: "A man is playing the guitar on a stage.", pair: "Someone is making music." },
    { text: "The company reported higher profits this year.", pair: "The company made a loss this year." },
  ],
};

function exampleButton({ text, pair }) {
  const button = create("button", { type: "button" }, text);
  if (pair !== null) button.append(create("span", { className: "pair-of-example" }, pair));
  button.addEventListener("click", () => {
    byId("texts").value = text;
    byId("pairs").value = pair ?? "";
    updateCount();
    predict();
  });
  return button;
}

/** The texts of a field: all of it, or its lines without empty ones at the end. */
function linesOf(field) {
  const value = field.value.replaceAll("\r\n", "\n").trimEnd();
  if (value === "") return [];
  return byId("one-text").checked ? [value] : value.split("\n").map((line) => line.trim());
}

/** The inputs in the form of the API. Throws an Error if they are incomplete or too large. */
function readInputs() {
  const texts = linesOf(byId("texts"));
  const pairs = byId("pairs-field").hidden ? [] : linesOf(byId("pairs"));
  if (texts.length === 0) throw new Error("Enter a text.");
  const paired = takesPairs() === true || pairs.length > 0;
  if (paired && texts.length !== pairs.length) {
    const difference = `${count(texts.length, "first text")} but ${count(pairs.length, "second text")}`;
    throw new Error(`${difference}: each line needs a second text on the same line of the other field.`);
  }
  const inputs = texts.map((text, index) => ({ text, pair: paired ? pairs[index] : null }));
  const filled = inputs.filter(({ text, pair }) => text || pair);
  if (filled.length > limits.texts_per_request) {
    const limit = count(limits.texts_per_request, "text");
    throw new Error(`${count(filled.length, "text")}: the server accepts at most ${limit} per request. Predict a file instead.`);
  }
  const bytes = new TextEncoder().encode(JSON.stringify(filled)).length + 1000;
  if (bytes > limits.body_bytes) {
    throw new Error(`These texts are ${sizeOf(bytes)}; the server accepts at most ${sizeOf(limits.body_bytes)}. Predict a file instead.`);
  }
  return filled;
}

function updateCount() {
  const texts = linesOf(byId("texts")).filter(Boolean).length;
  byId("texts-count").textContent = texts ? count(texts, "text") : "";
  showError("texts-error", "", byId("texts"), byId("pairs"));
}

let prediction = null; // AbortController of the request in progress

async function predict() {
  let inputs;
  showError("texts-error", "", byId("texts"), byId("pairs"));
  try {
    inputs = readInputs();
  } catch (error) {
    showError("texts-error", error.message, byId("texts"), byId("pairs"));
    byId("texts").focus();
    return;
  }
  prediction?.abort();
  const controller = (prediction = new AbortController());
  byId("predict").textContent = "Predicting…";
  byId("results").setAttribute("aria-busy", "true");
  try {
    const answers = [];
    for (const model of selectedModels()) { // one after the other: parallel requests would change each other's latency
      const start = performance.now();
      const response = await postJson("v1/predict", { model: model.name, inputs }, controller.signal);
      answers.push({ ...(await response.json()), model, roundTrip: performance.now() - start });
    }
    showResults(inputs, answers);
  } catch (error) {
    if (error.name !== "AbortError") {
      showError("texts-error", error.message);
      byId("results").hidden = true; // they belong to other texts
    }
  }
  if (controller !== prediction) return; // a later request is in progress
  byId("predict").textContent = "Predict";
  byId("results").removeAttribute("aria-busy");
}

// ---------------------------------------------------------------- results

/** Shows the answers of one or two models to the same inputs. */
function showResults(inputs, answers) {
  byId("empty").hidden = true;
  byId("results").hidden = false;
  byId("note").hidden = !answers.some(({ model }) => model.can_explain);
  const latency = answers.map(({ model, milliseconds: inServer, roundTrip }) => {
    const name = answers.length > 1 ? `${model.name}: ` : "";
    return `${name}${milliseconds(inServer)} in the server, ${milliseconds(roundTrip)} with the network`;
  });
  let summary = count(inputs.length, "text");
  if (answers.length > 1 && answers.every(({ model }) => model.problem !== "regression")) {
    const differing = inputs.filter((_, index) => differ(answers, index)).length;
    summary += differing ? `, the models disagree on ${differing}` : ", the models agree";
  }
  byId("summary").replaceChildren(create("h2", {}, summary), ...latency.map((line) => create("p", { className: "hint" }, line)));
  const explanations = new Map(); // of this run, by model and text
  const show = (index) => showDetails(inputs[index], index, answers, explanations);
  byId("table").replaceChildren(...(inputs.length > 1 ? [resultsTable(inputs, answers, show)] : []));
  show(0);
  const first = answers.map(({ model, predictions }) => `${model.name}: ${describe(predictions[0])}`).join("; ");
  announce(inputs.length > 1 ? summary : `${first}. ${latency.join(". ")}`);
}

function differ(answers, index) {
  return new Set(answers.map(({ predictions }) => JSON.stringify(predictions[index].label))).size > 1;
}

function labelOf({ label }) {
  if (Array.isArray(label)) return label.length ? label.join(", ") : "no label";
  return typeof label === "number" ? String(Number(label.toPrecision(4))) : label;
}

function describe(prediction) {
  return prediction.probability === null ? labelOf(prediction) : `${labelOf(prediction)}, ${percent(prediction.probability)}`;
}

/** A table with a row for each text; pressing a text calls show(index). */
function resultsTable(inputs, answers, show) {
  const rows = inputs.map(({ text, pair }, index) => {
    const button = create("button", { type: "button" }, pair === null ? text : `${text} / ${pair}`);
    const row = create("tr", {}, create("th", { className: "text", scope: "row" }, button));
    for (const { predictions } of answers) {
      const prediction = predictions[index];
      const cell = create("td", {}, create("div", {}, labelOf(prediction)));
      if (differ(answers, index)) cell.className = "differs";
      const notes = [prediction.probability === null ? "" : percent(prediction.probability), prediction.truncated ? "truncated" : ""];
      cell.append(create("div", { className: "hint" }, notes.filter(Boolean).join(", ")));
      row.append(cell);
    }
    row.addEventListener("click", () => {
      rows.forEach((other) => other.removeAttribute("aria-current"));
      row.setAttribute("aria-current", "true");
      show(index);
    });
    return row;
  });
  rows[0].setAttribute("aria-current", "true");
  const titles = answers.map(({ model }) => create("th", { scope: "col" }, answers.length > 1 ? model.name : "Prediction"));
  const head = create("tr", {}, create("th", { className: "text", scope: "col" }, "Text (select one to see its details)"), ...titles);
  return create("div", { className: "scroll card" }, create("table", {}, create("thead", {}, head), create("tbody", {}, ...rows)));
}

/** Shows everything about one text, with one column per model. */
function showDetails(input, index, answers, explanations) {
  const columns = answers.map(({ model, predictions }) => {
    const prediction = predictions[index];
    const tokens = `${count(prediction.n_tokens, "token")}${prediction.truncated ? ", truncated" : ""}`;
    const title = create("h3", {}, model.name, create("span", { className: "hint" }, tokens));
    const right = create("div", { className: "explanation" });
    const key = `${model.name} ${index}`;
    if (!explanations.has(key)) explanations.set(key, model.can_explain ? loadExplanation(model, input) : Promise.resolve(null));
    fillExplanation(right, explanations.get(key), model, input, prediction);
    return create("article", { className: "answer card", "aria-label": model.name }, title, predictionView(model, prediction), right);
  });
  const className = columns.length === 1 ? "answers single" : "answers";
  byId("details").replaceChildren(create("div", { className }, ...columns));
}

function predictionView(model, prediction) {
  const value = create("p", { className: "value" }, labelOf(prediction));
  if (prediction.probability !== null) value.append(create("small", {}, ` ${percent(prediction.probability)}`));
  const view = create("div", {}, value);
  if (model.problem === "regression") view.append(create("p", { className: "hint" }, "predicted score"));
  else view.append(...probabilityBars(model, prediction));
  return view;
}

/** A bar per label, in the model's order; of many labels, the most probable ones and a button that shows all. */
function probabilityBars(model, { label, probabilities }) {
  const chosen = new Set([label].flat());
  let names = Object.keys(probabilities);
  if (names.length > TOP_LABELS) names.sort((a, b) => probabilities[b] - probabilities[a]);
  else names = model.labels.filter((name) => name in probabilities);
  const bar = (name) => {
    const fill = create("div", { className: "bar" });
    fill.style.width = percent(probabilities[name]);
    const track = create("div", { className: "track", "aria-hidden": "true" }, fill);
    const className = chosen.has(name) ? "chosen" : "";
    return create("li", { className }, create("span", {}, name), create("span", {}, percent(probabilities[name])), track);
  };
  const list = create("ul", { className: "bars", "aria-label": "Probabilities" }, ...names.slice(0, TOP_LABELS).map(bar));
  if (names.length <= TOP_LABELS) return [list];
  const button = create("button", { type: "button", "aria-expanded": "false" }, `Show all ${names.length} labels`);
  button.addEventListener("click", () => {
    const isAll = list.children.length > TOP_LABELS;
    list.replaceChildren(...names.slice(0, isAll ? TOP_LABELS : names.length).map(bar));
    button.textContent = isAll ? `Show all ${names.length} labels` : `Show the top ${TOP_LABELS}`;
    button.setAttribute("aria-expanded", String(!isAll));
  });
  return [list, button];
}

// ---------------------------------------------------------------- explanation

async function loadExplanation(model, { text, pair }) {
  const response = await postJson("v1/explain", { model: model.name, text, pair });
  return response.json();
}

async function fillExplanation(view, promise, model, input, prediction) {
  const lengths = prediction.lengths.join(" → ");
  const heading = create("h4", {}, `Positions in each block: ${lengths}`);
  view.replaceChildren(create("p", { className: "hint" }, "Computing the explanation…"));
  let explanation;
  try {
    explanation = await promise;
  } catch (error) {
    const message = create("p", { className: "error", role: "alert" }, `No explanation: ${error.message}`);
    view.replaceChildren(message, create("div", {}, heading, funnelOfLengths(prediction.lengths)));
    return;
  }
  if (explanation === null) {
    const hint = `No contributions: the ${engineOf(model)} engine has no attention weights to show.`;
    const text = create("p", {}, input.pair === null ? input.text : `${input.text} / ${input.pair}`);
    const funnel = create("div", {}, heading, funnelOfLengths(prediction.lengths));
    view.replaceChildren(create("div", {}, create("h4", {}, "Text"), text), funnel, create("p", { className: "hint" }, hint));
    return;
  }
  const marks = new Marks();
  const words = create("div", {}, ...heatMap(input, explanation, marks));
  const funnel = create("div", {}, heading, funnelOfPositions(input, explanation, marks));
  view.replaceChildren(words, marks.readout, funnel);
}

const READOUT = "Point at a word or a position, or use the arrow keys, to see its share.";

/** The tokens and positions of one explanation: the active one is described, and those that share tokens with it are marked. */
class Marks {
  static lists = 0; // makes ids unique

  constructor() {
    this.readout = create("p", { className: "readout" }, READOUT);
    this.all = new Map(); // option: {tokens, description}
    this.lastActive = new Map(); // list: option
  }

  /** Creates an option of a list. `share` is relative to the largest one, from 0 to 1. */
  option(tag, tokens, description, share, ...children) {
    const option = create(tag, { role: "option", "aria-selected": "false", "aria-label": description }, ...children);
    option.style.setProperty("--share", Math.min(share, 1).toFixed(3));
    this.all.set(option, { tokens, description });
    return option;
  }

  /** Makes a list of options: one stop of the Tab key, in which the arrow keys move. */
  list(list, label) {
    const options = [...list.querySelectorAll("[role=option]")];
    const number = Marks.lists++;
    options.forEach((option, index) => (option.id = `option-${number}-${index}`));
    list.setAttribute("role", "listbox");
    list.setAttribute("aria-label", label);
    list.tabIndex = 0;
    const activate = (option) => {
      this.lastActive.set(list, option);
      list.setAttribute("aria-activedescendant", option.id);
      this.activate(option);
    };
    list.addEventListener("focus", () => activate(this.lastActive.get(list) ?? options[0]));
    list.addEventListener("blur", () => this.activate(null));
    list.addEventListener("pointerover", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) activate(option);
    });
    list.addEventListener("pointerleave", () => document.activeElement !== list && this.activate(null));
    list.addEventListener("keydown", (event) => {
      const index = options.indexOf(this.lastActive.get(list));
      const last = options.length - 1;
      const next = { ArrowRight: index + 1, ArrowDown: index + 1, ArrowLeft: index - 1, ArrowUp: index - 1, Home: 0, End: last }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      activate(options[Math.max(0, Math.min(next, last))]);
      this.lastActive.get(list).scrollIntoView({ block: "nearest" });
    });
    return list;
  }

  activate(active) {
    const current = this.all.get(active);
    for (const [option, { tokens }] of this.all) {
      option.setAttribute("aria-selected", String(option === active));
      option.classList.toggle("linked", option !== active && Boolean(current?.tokens.some((token) => tokens.includes(token))));
    }
    this.readout.textContent = current ? current.description : READOUT;
  }
}

/** The largest share of the items that contain a token of the text; special tokens often have much larger ones. */
function largestShare(items, tokens) {
  const ofText = items.filter((item) => item.tokens.some((index) => tokens[index].start !== null));
  return Math.max(1e-9, ...ofText.map((item) => item.contribution));
}

/** A title and the text (and its pair), with the contribution of each token as its background. */
function heatMap(input, { tokens }, marks) {
  const spans = spansOf(tokens);
  const largest = largestShare(spans, tokens);
  const list = create("div", { className: "words" });
  [input.text, input.pair].forEach((text, segment) => {
    if (text === null) return;
    const characters = Array.from(text); // code points, as the offsets of the API; a string's index counts UTF-16 units
    const line = create("div");
    let end = 0;
    for (const span of spans.filter((item) => item.segment === segment)) {
      const isSpecial = span.start === null;
      const piece = isSpecial ? span.text.trim() : characters.slice(span.start, span.end).join("");
      if (!isSpecial) {
        line.append(characters.slice(end, span.start).join(""));
        end = span.end;
      }
      const option = marks.option("span", span.tokens, `“${piece.trim()}”: ${percent(span.contribution)}`, span.contribution / largest, piece);
      if (isSpecial) option.classList.add("special");
      line.append(...(isSpecial && line.hasChildNodes() ? [" ", option] : isSpecial ? [option, " "] : [option]));
    }
    list.append(line);
  });
  markUnread(list, input, spans);
  const scale = create("span", { className: "hint" }, `full color: ${percent(largest)} or more`);
  return [create("h4", {}, "Contribution of each token", scale), marks.list(list, "Contribution of each token")];
}

/** Tokens in their order; those that cover the same characters, such as the bytes of an emoji, are one span. */
function spansOf(tokens) {
  const spans = [];
  tokens.forEach(({ text, contribution, start, end, segment }, index) => {
    const previous = spans.at(-1);
    if (start !== null && previous && previous.start !== null && previous.segment === segment && start < previous.end) {
      previous.end = Math.max(previous.end, end);
      previous.contribution += contribution;
      previous.tokens.push(index);
    } else {
      spans.push({ text, contribution, start, end, segment, tokens: [index] });
    }
  });
  return spans;
}

/** Appends the end of each text that was truncated. */
function markUnread(list, input, spans) {
  [...list.children].forEach((line, segment) => {
    const text = Array.from([input.text, input.pair][segment]);
    const end = Math.max(0, ...spans.filter((span) => span.segment === segment && span.start !== null).map((span) => span.end));
    const rest = text.slice(end).join("");
    if (rest.trim()) line.append(create("span", { className: "unread" }, create("b", {}, " not\u00a0read: "), rest.trimStart()));
  });
}

/** A row per block, narrower than the one before, with the positions and the tokens that each pools. */
function funnelOfPositions(input, { tokens, blocks }, marks) {
  const funnel = create("div", { className: "funnel" });
  const characters = [Array.from(input.text), Array.from(input.pair ?? "")];
  blocks.forEach((positions, block) => {
    const largest = largestShare(positions, tokens);
    const options = positions.map(({ tokens: pooled, contribution }, index) => {
      const text = textOf(pooled.map((token) => tokens[token]), characters) || "(nothing)";
      const description = `“${text}”: ${percent(contribution)}, position ${index + 1} of ${positions.length} in block ${block}`;
      return marks.option("div", pooled, description, contribution / largest, create("span", {}, text));
    });
    const row = rowOf(options, blocks[0].length);
    funnel.append(labelOfRow(block, positions.length), marks.list(row, `Positions of block ${block}`));
  });
  return funnel;
}

/** The text of pooled tokens, as in the input. */
function textOf(tokens, characters) {
  let text = "";
  let previous = null; // end of the previous token
  for (const token of tokens) {
    if (token.start !== null && previous !== null && token.start < previous) continue; // another byte of the same character
    if (token.start === null || token.start !== previous) text += " ";
    text += token.start === null ? token.text.trim() : characters[token.segment].slice(token.start, token.end).join("");
    previous = token.end;
  }
  return text.trim();
}

/** The same rows without an explanation. */
function funnelOfLengths(lengths) {
  const funnel = create("div", { className: "funnel" });
  lengths.forEach((length, block) => {
    const positions = Array.from({ length }, () => create("div"));
    const row = rowOf(positions, lengths[0]);
    row.setAttribute("aria-hidden", "true");
    funnel.append(labelOfRow(block, length), row);
  });
  return funnel;
}

function labelOfRow(block, length) {
  return create("p", { className: "label" }, create("span", {}, `block ${block}`), create("span", {}, count(length, "position")));
}

/** Positions side by side. The width grows with the square root of their number, so that short rows leave room for text. */
function rowOf(positions, longest) {
  const row = create("div", { className: positions.length > DENSE_ROW ? "positions dense" : "positions" }, ...positions);
  row.style.width = percent(Math.sqrt(positions.length / longest));
  return row;
}

// ---------------------------------------------------------------- files

/** Uploads the chosen file and shows its job. */
function predictFile() {
  const file = byId("file").files[0];
  const error = !file
    ? "Choose a file."
    : file.size > limits.file_bytes
      ? `${file.name} is ${sizeOf(file.size)}; the server accepts at most ${sizeOf(limits.file_bytes)}. Split it.`
      : "";
  showError("file-error", error, byId("file"));
  if (error) {
    byId("file").focus();
    return;
  }
  const [model] = selectedModels();
  const query = new URLSearchParams({ model: model.name });
  for (const [name, field] of [["text_column", byId("text-column")], ["pair_column", byId("pair-column")]]) {
    if (field.value.trim() && !field.parentElement.hidden) query.set(name, field.value.trim());
  }
  new FileJob(file, model).run(query);
}

/** A file's upload, progress and predictions, as an item of the list of jobs. */
class FileJob {
  constructor(file, model) {
    this.file = file;
    this.controller = new AbortController();
    this.state = create("span", { className: "hint" }, "Uploading…");
    this.bar = create("progress", { "aria-label": `Progress of ${file.name}` });
    this.error = create("p", { className: "error", role: "alert" });
    this.button = create("button", { type: "button" }, "Cancel");
    this.button.addEventListener("click", () => this.cancel());
    this.buttons = create("div", { className: "row" }, this.button);
    const title = create("div", { className: "row" }, create("strong", {}, file.name), create("span", { className: "hint" }, model.name), this.state);
    this.state.classList.add("end");
    this.item = create("li", { className: "card" }, title, this.bar, this.error, this.buttons);
    byId("jobs").prepend(this.item);
  }

  async run(query) {
    try {
      const headers = { "X-Filename": encodeURIComponent(this.file.name), "Content-Type": "application/octet-stream" };
      const options = { method: "POST", headers, body: this.file, signal: this.controller.signal };
      this.id = (await (await request(`v1/files?${query}`, options)).json()).id;
      await this.follow();
    } catch (error) {
      if (error.name !== "AbortError") this.finish("failed", error.message);
    }
  }

  /** Shows the progress until the job ends. */
  async follow() {
    for (;;) {
      let job;
      try {
        job = await (await request(`v1/files/${this.id}`, { signal: this.controller.signal })).json();
      } catch (error) {
        const isTemporary = error.name !== "AbortError" && (!(error instanceof ApiError) || [429, 503].includes(error.status));
        if (!isTemporary) throw error;
        this.error.textContent = error.message;
        await wait(RETRY_MILLISECONDS);
        continue;
      }
      this.error.textContent = "";
      if (!["queued", "running"].includes(job.status)) {
        this.finish(job.status, job.detail ?? "", job.total);
        return;
      }
      if (job.total > 0) {
        this.bar.max = job.total;
        this.bar.value = job.done;
      }
      const progress = `${job.done.toLocaleString("en")} of ${count(job.total, "row")}`;
      this.state.textContent = job.status === "queued" ? "Waiting for other files…" : job.total > 0 ? progress : "Reading the file…";
      await wait(POLL_MILLISECONDS);
    }
  }

  finish(status, message, total = 0) {
    this.bar.hidden = status !== "done";
    this.bar.max = 1;
    this.bar.value = 1;
    this.state.textContent = status === "done" ? count(total, "prediction") : status;
    this.error.textContent = message;
    this.button.textContent = "Remove";
    announce(`${this.file.name}: ${this.state.textContent}`);
    if (status !== "done") return;
    const download = create("button", { type: "button", className: "primary" }, "Download predictions");
    download.addEventListener("click", () => this.download());
    this.buttons.prepend(download);
  }

  async download() {
    try {
      const blob = await (await request(`v1/files/${this.id}/predictions`)).blob();
      const url = URL.createObjectURL(blob);
      create("a", { href: url, download: `${this.file.name.replace(/\.[^.]*$/, "")}-predictions.csv` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60000);
      this.error.textContent = "";
    } catch (error) {
      this.error.textContent = error.message;
    }
  }

  /** Stops the upload or the job, and removes the item. */
  async cancel() {
    this.controller.abort();
    try {
      if (this.id) await request(`v1/files/${this.id}`, { method: "DELETE" });
    } catch (error) {
      if (error.status !== 404) {
        this.error.textContent = error.message;
        return;
      }
    }
    this.item.remove();
    byId("file").focus();
    announce(`${this.file.name}: removed`);
  }
}

// ---------------------------------------------------------------- start

function selectTab(tab) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    const isSelected = other === tab;
    other.setAttribute("aria-selected", String(isSelected));
    other.tabIndex = isSelected ? 0 : -1;
    byId(other.getAttribute("aria-controls")).hidden = !isSelected;
  }
}

function connectControls() {
  byId("theme").addEventListener("click", () => {
    localStorage.setItem("funnel-theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    applyTheme();
  });
  byId("reload").addEventListener("click", loadModels);
  for (const select of [byId("model"), byId("second-model")]) {
    select.addEventListener("change", () => {
      updateModels();
      if (!byId("results").hidden) predict(); // shows the results of the models that are now selected
    });
  }
  const tabs = [byId("texts-tab"), byId("file-tab")];
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => selectTab(tab));
    tab.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      selectTab(tabs[1 - index]);
      tabs[1 - index].focus();
    });
  });
  for (const field of [byId("texts"), byId("pairs")]) {
    field.addEventListener("input", updateCount);
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      predict();
    });
  }
  byId("one-text").addEventListener("change", updateCount);
  byId("texts-form").addEventListener("submit", (event) => {
    event.preventDefault();
    predict();
  });
  byId("file").addEventListener("change", () => showError("file-error", "", byId("file")));
  byId("file-form").addEventListener("submit", (event) => {
    event.preventDefault();
    predictFile();
  });
}

document.addEventListener("DOMContentLoaded", () => {
  applyTheme();
  connectControls();
  loadModels();
});
