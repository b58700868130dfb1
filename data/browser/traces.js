// The trace browser: one module for the widget in a notebook and for the page without a kernel.
//
// `mount(root, source)` builds it. A source gives `summary`, `pieces(add)`, which calls `add` with
// each piece of the index, `question(place)` and `image(name)`, which return promises.
// Responses may hold markup, so nothing here is ever set as HTML: all text goes into text nodes.

const MARKS = {
  correct: "✓", wrong: "✗", parsed: "•", unparsed: "?", truncated: "…", refused: "⊘", error: "!",
};
const PARTS = {
  thought: "thought", answer: "answer", unread: "not read: a further question begins",
};
const ROW = 64; // pixels of a row of the list, as in traces.css
const BEYOND = 6; // rows that are drawn above and below those in sight
const PATIENCE = 20000; // milliseconds that a kernel may take for a question
const STEP = 10; // questions that Page Up and Page Down pass

const number = new Intl.NumberFormat("en");
const say = (count, noun) => `${number.format(count)} ${noun}${count === 1 ? "" : "s"}`;
let instances = 0;

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const hidden = (text) => el("span", { class: "ot-hidden" }, text);
const sign = (mark) => el("span", { "aria-hidden": "true" }, mark);

// --- The index: status, column and length of every sample -----------------------------------

// A piece as Python's `pack_piece` writes it.
function unpack(buffer) {
  const size = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  const samples = head.counts.reduce((sum, count) => sum + count, 0);
  const at = 4 + size;
  return {
    ...head,
    tokens: new Uint32Array(buffer, at, samples),
    statuses: new Uint8Array(buffer, at + 4 * samples, samples),
    columns: new Uint8Array(buffer, at + 5 * samples, samples),
  };
}

class Index {
  constructor(summary) {
    const { held, held_samples: samples } = summary;
    this.questions = []; // those whose samples are known
    this.texts = []; // what the search looks through
    this.first = new Uint32Array(held + 1); // place of each question's first sample
    this.tokens = new Uint32Array(samples);
    this.statuses = new Uint8Array(samples);
    this.columns = new Uint8Array(samples);
    this.totals = new Uint32Array(summary.statuses.length);
    this.correct = summary.statuses.indexOf("correct");
    this.waiting = new Map(); // pieces that came before their turn
  }

  get size() {
    return this.questions.length;
  }

  add(buffer) {
    const piece = unpack(buffer);
    if (piece.start < this.size) return; // it came twice
    this.waiting.set(piece.start, piece);
    while (this.waiting.has(this.size)) this.append(this.waiting.get(this.size));
  }

  append(piece) {
    this.waiting.delete(piece.start);
    let at = this.first[this.size];
    this.tokens.set(piece.tokens, at);
    this.statuses.set(piece.statuses, at);
    this.columns.set(piece.columns, at);
    piece.statuses.forEach((status) => (this.totals[status] += 1));
    piece.questions.forEach(([id, source, stem, options], i) => {
      at += piece.counts[i];
      this.questions.push({ id, source, stem });
      this.texts.push([id, source, stem, ...options].join("\n").toLowerCase());
      this.first[this.size] = at;
    });
  }

  // Whether one sample is what the filters ask for.
  matches(at, wanted) {
    return (
      (wanted.column < 0 || this.columns[at] === wanted.column) &&
      (wanted.status < 0 || this.statuses[at] === wanted.status) &&
      this.tokens[at] >= wanted.shortest &&
      this.tokens[at] <= wanted.longest
    );
  }

  // Correct samples of a question, of the wanted column, and how many there are.
  passes(place, column) {
    let correct = 0;
    let all = 0;
    for (let at = this.first[place]; at < this.first[place + 1]; at++) {
      if (column >= 0 && this.columns[at] !== column) continue;
      all += 1;
      if (this.statuses[at] === this.correct) correct += 1;
    }
    return [correct, all];
  }

  // Places of the questions with a sample that is wanted and a pass count that is wanted.
  filter(wanted) {
    const text = wanted.text.trim().toLowerCase();
    const places = [];
    for (let place = 0; place < this.size; place++) {
      if (text && !this.texts[place].includes(text)) continue;
      const [correct] = this.passes(place, wanted.column);
      if (correct < wanted.fewest || correct > wanted.most) continue;
      for (let at = this.first[place]; at < this.first[place + 1]; at++) {
        if (this.matches(at, wanted)) {
          places.push(place);
          break;
        }
      }
    }
    return places;
  }
}

// --- A question in full ----------------------------------------------------------------------

function status(name) {
  return el("span", { class: `ot-status ot-${name}` }, sign(`${MARKS[name] ?? ""} `), name);
}

function stepTag(step) {
  if (step.true) return el("span", { class: "ot-tag ot-yes" }, sign("✓"), hidden(` (true step: ${step.what}) `));
  return el("span", { class: "ot-tag ot-no" }, sign("✗ "), `false: ${step.what}`);
}

// The response: parts under their names, the characters that were read, the steps with their truth.
function response(sample) {
  const text = el("div", {
    class: "ot-text", tabindex: "0", role: "group", "aria-label": `response ${sample.index}`,
  });
  let part = "";
  sample.segments.forEach((segment, i) => {
    let written = segment.text;
    if (segment.part !== part) {
      part = segment.part;
      text.append(el("span", { class: "ot-part" }, PARTS[part]));
      written = written.replace(/^\n+/, ""); // the name of the part ends the line
    }
    const step = sample.steps?.[segment.step];
    const kinds = [`ot-${part}`];
    if (step) kinds.push("ot-step", step.true ? "ot-true" : "ot-false");
    if (segment.read && sample.segments[i - 1]?.read !== true) {
      text.append(el("span", { class: "ot-tag ot-here" }, "read here ▸"));
    }
    text.append(el(segment.read ? "mark" : "span", { class: kinds.join(" ") }, written));
    if (step && sample.segments[i + 1]?.step !== segment.step) text.append(stepTag(step));
  });
  if (!sample.segments.length) text.append("(empty)");
  return text;
}

function sampleCard(sample) {
  const facts = [say(sample.tokens, "token"), `ended by ${sample.finish}`];
  if (sample.forced) facts.push("forced exit");
  const letter = sample.letter ? ` · letter ${sample.letter}` : "";
  const notes = [el("p", { class: "ot-why" }, el("b", {}, "Why: "), sample.reason)];
  if (sample.reasoning) {
    const { valid, note } = sample.reasoning;
    notes.push(el("p", { class: "ot-why" }, el("b", {}, "Reasoning: "), sign(valid ? "✓ " : "✗ "),
      `${valid ? "valid" : "not valid"}, ${note}.`));
  }
  return el("article", { class: "ot-card", "data-status": sample.status },
    el("h5", {}, status(sample.status), `${letter} · sample ${sample.index}`),
    el("p", { class: "ot-soft" }, facts.join(" · ")), ...notes, response(sample));
}

function optionList(question) {
  const items = Object.entries(question.options).map(([letter, text]) => {
    const right = letter === question.answer;
    return el("li", { class: right ? "ot-right" : undefined }, el("b", {}, `${letter} `), text,
      right ? el("span", { class: "ot-tag ot-yes" }, sign("✓ "), "right answer") : null);
  });
  return el("ul", { class: "ot-options" }, ...items);
}

function picture(image, source) {
  const figure = el("figure", {});
  const lost = () => figure.replaceChildren(el("p", { class: "ot-soft" }, `(${image.alt}: the picture is not at hand)`));
  source.image(image.name).then((url) => {
    if (url) figure.replaceChildren(el("img", { src: url, alt: image.alt }));
    else lost();
  }, lost);
  return figure;
}

function columnOf(column, samples) {
  const correct = samples.filter((sample) => sample.status === "correct").length;
  return el("section", { class: "ot-column", "aria-label": column.label },
    el("h4", { title: column.model }, column.label,
      el("span", { class: "ot-soft" }, ` ${correct} of ${say(samples.length, "sample")} correct`)),
    el("div", { class: "ot-cards" }, ...samples.map(sampleCard)));
}

function questionView(question, summary, source, shown) {
  const columns = summary.columns
    .map((column, i) => [column, shown.filter((sample) => sample.column === i)])
    .filter(([, samples]) => samples.length);
  const tags = Object.entries(question.tags).map(([name, value]) => `${name}: ${value}`);
  return [
    el("h3", { tabindex: "-1" }, `Question ${number.format(question.place + 1)}`),
    el("p", { class: "ot-soft" }, [question.source, question.id, ...tags].join(" · ")),
    el("div", { class: "ot-asked" }, ...question.images.map((image) => picture(image, source)),
      el("div", {}, el("p", { class: "ot-stem" }, question.stem), optionList(question))),
    el("div", { class: columns.length > 1 ? "ot-columns ot-several" : "ot-columns" },
      ...columns.map(([column, samples]) => columnOf(column, samples))),
  ];
}

// --- The browser -----------------------------------------------------------------------------

class Browser {
  constructor(root, source, { everywhere }) {
    this.heading = everywhere ? "h1" : "h2"; // in a page of its own, or within a notebook
    this.source = source;
    this.summary = source.summary;
    this.root = root;
    this.name = `ot${(instances += 1)}`;
    this.index = new Index(this.summary);
    this.places = []; // of the questions that pass the filters
    this.row = -1; // the chosen one's place among them
    this.current = -1; // the question that is shown
    this.everything = false; // are samples shown that do not pass the filters
    this.cache = new Map();
    this.build();
    const target = everywhere ? document : root;
    this.onkey = (event) => this.key(event);
    target.addEventListener("keydown", this.onkey);
    this.close = () => target.removeEventListener("keydown", this.onkey);
    this.empty();
    Promise.resolve(source.pieces((buffer) => this.receive(buffer), (text) => this.fail(text)))
      .catch((error) => this.fail(String(error.message ?? error)));
  }

  build() {
    const { name } = this;
    this.root.classList.add("octomed-traces");
    // JupyterLab leaves the keys to an element that says so.
    this.root.setAttribute("data-lm-suppress-shortcuts", "true");
    this.count = el("p", { class: "ot-count", role: "status", "aria-live": "polite" });
    this.list = el("div", {
      class: "ot-list", role: "listbox", tabindex: "0", "aria-label": "questions",
      onscroll: () => this.draw(),
    });
    this.rows = el("div", { class: "ot-rows", role: "presentation" });
    this.list.append(this.rows);
    this.panel = el("section", { class: "ot-panel", "aria-label": "the chosen question" });
    this.root.replaceChildren(
      el(this.heading, {}, "Samples ", el("span", { class: "ot-soft" }, this.summary.title)),
      this.amounts(), this.filters(name), this.keys(), this.count,
      el("div", { class: "ot-body" }, this.list, this.panel));
  }

  amounts() {
    const { held, total, samples, held_samples: heldSamples, columns } = this.summary;
    const of = (part, all, noun) =>
      part === all ? say(all, noun) : `${number.format(part)} of ${say(all, noun)}`;
    const text = [of(held, total, "question"), of(heldSamples, samples, "sample"), say(columns.length, "model")];
    const where = held === total ? "" : " are on this page";
    return el("p", { class: "ot-soft ot-amounts" }, text.join(", ") + where + ".");
  }

  filters(name) {
    const change = () => this.refilter();
    const field = (label, input, id) => {
      input.setAttribute("id", `${name}-${id}`);
      return el("div", { class: "ot-field" }, el("label", { for: `${name}-${id}` }, label), input);
    };
    const amount = (id) => el("input", { type: "number", min: "0", inputmode: "numeric", oninput: change, placeholder: id });
    const choice = (options) => el("select", { onchange: change },
      ...options.map(([value, text]) => el("option", { value }, text)));
    this.inputs = {
      text: el("input", { type: "search", oninput: change, placeholder: "stem, options, id, source" }),
      status: choice([["-1", "any status"], ...this.summary.statuses.map((s, i) => [String(i), `${MARKS[s]} ${s}`])]),
      column: choice([["-1", "any model"], ...this.summary.columns.map((c, i) => [String(i), c.label])]),
      fewest: amount("least"), most: amount("most"), shortest: amount("least"), longest: amount("most"),
    };
    const range = (label, low, high, id) => el("fieldset", { class: "ot-field" }, el("legend", {}, label),
      el("span", { class: "ot-range" }, el("label", { for: `${name}-${id}-low`, class: "ot-hidden" }, `${label}, at least`),
        this.inputs[low], sign("–"),
        el("label", { for: `${name}-${id}-high`, class: "ot-hidden" }, `${label}, at most`), this.inputs[high]));
    for (const [input, id] of [["fewest", "pass-low"], ["most", "pass-high"], ["shortest", "length-low"], ["longest", "length-high"]]) {
      this.inputs[input].setAttribute("id", `${name}-${id}`);
    }
    const form = el("form", { class: "ot-filters", role: "search", "aria-label": "filters",
      onsubmit: (event) => event.preventDefault(), onreset: () => setTimeout(change) },
      field("Search questions", this.inputs.text, "text"),
      field("A sample is", this.inputs.status, "status"),
      this.summary.columns.length > 1 ? field("of", this.inputs.column, "column") : null,
      range("Correct samples", "fewest", "most", "pass"),
      range("Tokens of a sample", "shortest", "longest", "length"),
      el("button", { type: "reset" }, "Clear filters"));
    return form;
  }

  keys() {
    const keys = [["←", "→", "previous and next question"], ["↑", "↓", "Home", "End", "in the list"],
      ["/", "search"], ["Esc", "back to the list"]];
    const parts = keys.map((entry) => el("span", {},
      ...entry.slice(0, -1).map((key) => el("kbd", {}, key)), ` ${entry.at(-1)}`));
    return el("p", { class: "ot-soft ot-keys" }, "Keys: ", ...parts);
  }

  receive(buffer) {
    this.index.add(buffer);
    // Questions that come while somebody reads are added at the end, and move nothing.
    this.refilter({ keep: true });
  }

  fail(text) {
    this.count.textContent = text;
    if (!this.index.size) this.panel.replaceChildren();
  }

  wanted() {
    const { inputs } = this;
    const read = (input, otherwise) => (input.value === "" ? otherwise : Number(input.value));
    return {
      text: inputs.text.value,
      status: Number(inputs.status.value),
      column: Number(inputs.column.value),
      fewest: read(inputs.fewest, 0),
      most: read(inputs.most, Infinity),
      shortest: read(inputs.shortest, 0),
      longest: read(inputs.longest, Infinity),
    };
  }

  refilter({ keep = false } = {}) {
    this.chosen = this.wanted();
    this.places = this.index.filter(this.chosen);
    this.row = this.places.indexOf(this.current);
    if (!keep) this.everything = false;
    if (this.row < 0 && this.places.length) this.choose(0);
    else if (!this.places.length) this.empty();
    else if (!keep) this.show();
    this.announce();
    this.draw(true);
  }

  announce() {
    const known = this.index.size;
    const { held } = this.summary;
    const still = known < held ? ` Reading: ${number.format(known)} of ${number.format(held)} questions so far.` : "";
    const where = this.row >= 0 ? ` This is ${number.format(this.row + 1)} of them.` : "";
    const matching = `${say(this.places.length, "question")} ${this.places.length === 1 ? "matches" : "match"}.`;
    this.count.textContent = matching + where + still;
  }

  empty() {
    this.current = -1;
    this.panel.replaceChildren(el("p", {}, this.index.size
      ? "No question matches these filters." : "The samples are being read …"));
  }

  // The rows of the list that are in sight.
  draw(force = false) {
    const height = this.list.clientHeight || 480;
    const from = Math.max(0, Math.floor(this.list.scrollTop / ROW) - BEYOND);
    const to = Math.min(this.places.length, Math.ceil((this.list.scrollTop + height) / ROW) + BEYOND);
    if (!force && from === this.from && to === this.to) return;
    Object.assign(this, { from, to });
    this.rows.style.height = `${this.places.length * ROW}px`;
    const rows = [];
    for (let row = from; row < to; row++) rows.push(this.rowOf(row));
    this.rows.replaceChildren(...rows);
    if (this.row >= from && this.row < to) this.list.setAttribute("aria-activedescendant", `${this.name}-row-${this.row}`);
    else this.list.removeAttribute("aria-activedescendant");
  }

  rowOf(row) {
    const place = this.places[row];
    const question = this.index.questions[place];
    const [correct, all] = this.index.passes(place, this.chosen.column);
    return el("div", {
      class: "ot-row", role: "option", id: `${this.name}-row-${row}`, style: `top:${row * ROW}px`,
      "aria-selected": String(row === this.row), "aria-posinset": String(row + 1),
      "aria-setsize": String(this.places.length), onclick: () => this.choose(row),
    },
    el("span", { class: "ot-passes" }, `${correct}/${all}`, hidden(" correct, ")),
    el("span", { class: "ot-brief" }, el("b", {}, `${number.format(place + 1)} `), question.stem));
  }

  choose(row) {
    if (!this.places.length) return;
    this.row = Math.min(Math.max(row, 0), this.places.length - 1);
    this.everything = false;
    const top = this.row * ROW;
    const bottom = top + ROW;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    else if (bottom > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = bottom - this.list.clientHeight;
    this.draw(true);
    this.announce();
    this.current = this.places[this.row];
    this.show();
  }

  question(place) {
    if (!this.cache.has(place)) {
      if (this.cache.size > 50) this.cache.delete(this.cache.keys().next().value);
      const asked = this.source.question(place);
      asked.catch(() => this.cache.delete(place));
      this.cache.set(place, asked);
    }
    return this.cache.get(place);
  }

  async show() {
    const place = this.current;
    let question;
    try {
      question = await this.question(place);
    } catch (error) {
      if (place === this.current) this.panel.replaceChildren(el("p", { role: "alert" }, String(error.message ?? error)));
      return;
    }
    if (place !== this.current) return; // somebody has gone on
    this.render(question);
    const next = this.places[this.row + 1];
    if (next !== undefined) this.question(next).catch(() => {});
  }

  render(question) {
    const first = this.index.first[question.place];
    const fits = (_, i) => this.index.matches(first + i, this.chosen);
    const matching = question.samples.filter(fits);
    const shown = this.everything ? question.samples : matching;
    const view = questionView(question, this.summary, this.source, shown);
    if (matching.length < question.samples.length) {
      const all = question.samples.length;
      view.splice(3, 0, el("p", {}, `${number.format(matching.length)} of ${say(all, "sample")} match the filters. `,
        el("button", { type: "button", "aria-pressed": String(this.everything),
          onclick: () => { this.everything = !this.everything; this.render(question); } },
        this.everything ? "Show only these" : `Show all ${all}`)));
    }
    this.panel.replaceChildren(...view);
    this.panel.scrollTop = 0;
  }

  key(event) {
    const inside = this.root.contains(event.target) || event.target === document.body;
    if (!inside || event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    const moves = { ArrowRight: 1, ArrowLeft: -1 };
    if (event.target === this.list) {
      Object.assign(moves, { ArrowDown: 1, ArrowUp: -1, PageDown: STEP, PageUp: -STEP, Home: -Infinity, End: Infinity });
    }
    if (event.key === "Escape") this.list.focus();
    else if (typing) { event.stopPropagation(); return; }
    else if (event.key === "/") this.inputs.text.focus();
    else if (event.key in moves) this.choose(this.row + moves[event.key]);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

export function mount(root, source, options = {}) {
  return new Browser(root, source, { everywhere: false, ...options });
}

// --- Without a kernel: everything lies in the page -------------------------------------------

// An element of the page, which may not be parsed yet; null if it never comes.
async function part(id) {
  for (;;) {
    const node = document.getElementById(id);
    const parsed = document.readyState !== "loading";
    if (node && (parsed || node.nextSibling)) return node;
    if (parsed) return null;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

async function inflate(node) {
  const text = atob(node.textContent.trim());
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

class PageSource {
  constructor() {
    this.summary = JSON.parse(document.getElementById("octomed-summary").textContent);
    this.chunks = new Map();
  }

  async pieces(add) {
    if (!globalThis.DecompressionStream) throw new Error("This browser cannot unpack the page: use one of 2023 or later.");
    for (let i = 0; i < this.summary.pieces; i++) add(await inflate(await part(`octomed-piece-${i}`)));
  }

  chunk(i) {
    if (!this.chunks.has(i)) {
      if (this.chunks.size > 8) this.chunks.delete(this.chunks.keys().next().value);
      const read = async () => JSON.parse(new TextDecoder().decode(await inflate(await part(`octomed-chunk-${i}`))));
      this.chunks.set(i, read());
    }
    return this.chunks.get(i);
  }

  async question(place) {
    const size = this.summary.chunk;
    return (await this.chunk(Math.floor(place / size)))[place % size];
  }

  async image(name) {
    const node = await part(`octomed-image-${name}`);
    return node && `data:image/png;base64,${node.textContent.trim()}`;
  }
}

export function openPage() {
  mount(document.getElementById("octomed-traces"), new PageSource(), { everywhere: true });
}

// --- With a kernel: questions are asked for one by one ---------------------------------------

class KernelSource {
  constructor(model) {
    this.model = model;
    this.summary = model.get("summary");
    this.answers = new Map(); // what was asked for → [resolve, reject]
    this.urls = [];
    this.listen = (message, buffers) => this.receive(message, buffers);
    model.on("msg:custom", this.listen);
  }

  receive(message, buffers) {
    const bytes = (buffers ?? []).map((view) => (view.buffer ?? view).slice(
      view.byteOffset ?? 0, (view.byteOffset ?? 0) + view.byteLength));
    if (message.kind === "piece") this.add?.(bytes[0]);
    if (message.kind === "failed") this.fail?.(message.text);
    const answer = this.answers.get(message.to);
    if (!answer) return;
    this.answers.delete(message.to);
    if (message.kind === "error") answer[1](new Error(message.text));
    else answer[0](message.kind === "image" ? bytes[0] : message.question);
  }

  ask(kind, content) {
    const to = `${kind} ${Object.values(content)[0]}`;
    return new Promise((resolve, reject) => {
      this.answers.set(to, [resolve, reject]);
      this.model.send({ kind, to, ...content });
      setTimeout(() => reject(new Error("The kernel does not answer: run the cell again.")), PATIENCE);
    });
  }

  pieces(add, fail) {
    this.add = (buffer) => {
      // What stands beside the widget for readers without a kernel is not needed now.
      document.querySelectorAll(`[data-octomed-plain="${this.model.get("name")}"]`)
        .forEach((node) => { node.hidden = true; });
      add(buffer);
    };
    this.fail = fail;
    this.model.send({ kind: "pieces" });
  }

  question(place) {
    return this.ask("question", { place });
  }

  async image(name) {
    const bytes = await this.ask("image", { name });
    if (!bytes) return null;
    const url = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
    this.urls.push(url);
    return url;
  }

  close() {
    this.model.off("msg:custom", this.listen);
    this.urls.forEach((url) => URL.revokeObjectURL(url));
  }
}

function render({ model, el: root }) {
  root.classList.add("ot-widget");
  const source = new KernelSource(model);
  const browser = mount(root, source);
  return () => { browser.close(); source.close(); };
}

export default { render };
