// The page: one session, its actions, what the model does for it, and the keyboard.

import * as api from "./api.js";
import * as dialogs from "./dialogs.js";
import { $, button, dropNotice, el, notice, say, setUpDialog } from "./dom.js";
import * as live from "./live.js";
import { indices, partAt, renderParts } from "./parts.js";

const LAYOUTS = [["auto", "The model decides"], ["T", "Text"], ["I", "Picture"], ["T I", "Text, picture"], ["T I T I T I", "Three panels"], ["", "Own …"]];
const LOST = "lost";

const studio = {
  model: null,
  view: null,
  busy: false,

  // ---- A session, and what is done to it ----

  show(view, focus = null) {
    const isOther = this.view?.session !== view.session || this.view.layout !== view.layout;
    this.view = view;
    renderParts(view, this);
    if (document.activeElement !== $("title")) $("title").value = view.title;
    document.title = view.title ? `${view.title} – Studio` : "Studio";
    $("hidden").textContent = view.branches.length;
    this.setBusy(this.busy || view.busy);
    $("looked").hidden = !this.model.explains || !view.parts.some((part) => part.generated);
    $("looked").href = api.lookedAddress(view.session);
    // What is chosen and not used yet stays chosen.
    if (isOther) showLayout(view.layout);
    for (const loss of view.losses) notice(`Of this session something is lost: ${loss}`, `loss-${loss}`);
    if (focus !== null && view.parts.length) partAt(Math.min(focus, view.parts.length - 1))?.focus();
  },

  setBusy(isBusy) {
    this.busy = isBusy;
    $("undo").disabled = isBusy || !this.view.can_undo;
    $("redo").disabled = isBusy || !this.view.can_redo;
    $("continue").hidden = isBusy;
    $("stop").hidden = !isBusy;
    document.body.classList.toggle("busy", isBusy);
  },

  // Answers whether it was done.
  async act(action, fields, focus = null) {
    try {
      this.show(await api.act(this.view.session, this.view.revision, action, fields), focus);
      return true;
    } catch (error) {
      await this.failed(error);
      return false;
    }
  },

  async failed(error) {
    if (error instanceof api.Lost) return waitForStudio();
    if (!(error instanceof api.Refused)) console.error(error);
    notice(error.message);
    if (error.status === 409 || error.code === "stale") await this.reload();
  },

  async reload(focus = null) {
    try {
      this.show(await api.session(this.view.session), focus);
    } catch (error) {
      if (error instanceof api.Lost) return waitForStudio();
      // It held nothing yet, and the studio has begun anew.
      this.show(await api.newSession());
      remember(this.view.session);
    }
    if (this.view.busy) setTimeout(() => this.follow(), 1000);
  },

  // Another tab has asked for something, or this one was loaded anew: wait until it is done.
  async follow() {
    const view = await api.session(this.view.session).catch(() => null);
    if (view?.busy) return setTimeout(() => this.follow(), 1000);
    this.busy = false;
    await this.reload();
  },

  step(place, by) { return this.act("step", { index: place, by }, place); },
  remove(place) { return this.act("delete", { index: place }, place); },
  move(from, to) {
    if (from === to || to < 0 || to >= this.view.parts.length) return;
    return this.act("move", { index: from, to }, to);
  },

  toggleFeeds(number) {
    const images = this.view.parts.filter((part) => part.type === "image").map((_, index) => index);
    const chosen = new Set(indices(this.view) ?? images);
    chosen.has(number) ? chosen.delete(number) : chosen.add(number);
    const place = Number(document.activeElement.closest(".part")?.dataset.place ?? 0);
    const left = [...chosen].sort((a, b) => a - b);
    return this.act("settings", { changes: { context_images: left.length ? left.join(",") : null } }, place);
  },

  // ---- The model ----

  // `prepare` does what has to be done before, and answers whether it was.
  async ask(request, prepare = async () => true) {
    if (this.busy) return;
    this.setBusy(true);
    let box = null;
    try {
      if (!(await prepare())) return;
      for await (const message of api.generate(this.view.session, this.view.revision, request)) {
        if (message.type === "start") (box = live.begin(message, this.view.parts.length)).scrollIntoView({ block: "nearest" });
        else if (message.type === "end") this.ended(message, request);
        else if (message.type === "refused") throw new api.Refused(message.message, 400, message.code);
        else live.show(message);
      }
    } catch (error) {
      this.busy = false;
      live.end();
      await this.failed(error);
      renderParts(this.view, this);
    } finally {
      this.setBusy(false);
    }
  },

  ended(message, request) {
    live.end();
    this.busy = false;
    const before = this.view.parts.length;
    message.view.busy = false;
    const place = request.part ?? before;
    this.show(message.view, place);
    for (const error of message.errors) notice(error);
    const words = { length: "Done: the text budget or the model's context is used up", stopped: "Stopped; what was finished is kept", stop: "Done: the model ended the document", layout: "Done", max_images: "Done: no more pictures are allowed (settings)" };
    say(words[message.reason] ?? "Done");
    if (message.reason === "length") notice(`${words.length}.`, "length");
    if ((request.candidates ?? 1) > 1 && !message.errors.length) this.alternativesDialog(place);
  },

  continue() {
    const layout = chosenLayout();
    const prepare = async () =>
      (await this.addWords()) && (layout === this.view.layout || (await this.act("layout", { layout })));
    return this.ask({ kind: "continue", candidates: Number($("candidates").value) }, prepare);
  },

  again(place, { candidates = 1, rest = "keep", settings = {} }) {
    return this.ask({ kind: "again", part: place, candidates, rest, settings });
  },

  async stop() {
    say("Stopping");
    await api.stop(this.view.session).catch((error) => this.failed(error));
  },

  // ---- Words and pictures ----

  async addWords() {
    const text = $("words").value.trim();
    if (!text) return true;
    const done = await this.act("insert", { index: this.view.parts.length, parts: [{ type: "text", text }] });
    if (done) setDraft("");
    return done;
  },

  async insertPictures(place, files, before = []) {
    try {
      const parts = [...before];
      for (const file of files) parts.push({ type: "image", upload: (await api.upload(file)).upload });
      if (parts.length) return await this.act("insert", { index: place, parts }, place + parts.length - 1);
    } catch (error) {
      await this.failed(error);
    }
    return false;
  },

  // At the caret of the words at the end: those before it become a part, then the pictures.
  async addPictures(files) {
    const field = $("words");
    const [before, after] = [field.value.slice(0, field.selectionStart).trim(), field.value.slice(field.selectionStart).trimStart()];
    const words = before ? [{ type: "text", text: before }] : [];
    if (await this.insertPictures(this.view.parts.length, files, words)) {
      setDraft(after);
      field.focus();
      field.setSelectionRange(0, 0);
    }
  },

  async replacePicture(place, files) {
    try {
      await this.act("replace", { index: place, image: (await api.upload(files[0])).upload }, place);
    } catch (error) {
      await this.failed(error);
    }
  },

  choosePicture(use) {
    const file = $("file");
    file.value = "";
    file.onchange = () => file.files.length && use([...file.files]);
    file.click();
  },

  edit(place) {
    const part = this.view.parts[place];
    const box = partAt(place);
    const field = el("textarea", { rows: 3, "aria-label": `Text of part ${place + 1}` });
    field.value = part.text;
    const keep = async () => {
      if (field.value !== part.text) return this.act("edit", { index: place, text: field.value }, place);
      this.show(this.view, place);
      return true;
    };
    const save = (andGo) => (andGo ? this.ask({ kind: "follow", part: place }, keep) : keep());
    const row = el("div", { class: "row" }, button("Save and regenerate", () => save(true), { class: "strong", title: "Ctrl+Enter: generated parts behind it are made again" }), button("Save only", () => save(false), { class: "", title: "Ctrl+S: nothing else changes" }), button("Cancel", () => this.show(this.view, place)));
    field.addEventListener("keydown", (event) => {
      const isControl = event.ctrlKey || event.metaKey;
      if (event.key === "Escape") this.show(this.view, place);
      else if (isControl && event.key === "Enter") save(true);
      else if (isControl && event.key.toLowerCase() === "s") save(false);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    box.replaceChildren(el("div", { class: "edit" }, field, row));
    field.focus();
  },

  // Files go to `use`, a dragged part to `move`.
  acceptDrop(box, use, move = null) {
    const fits = (event) => event.dataTransfer.types.includes("Files") || (move && event.dataTransfer.types.includes("application/x-part"));
    box.addEventListener("dragover", (event) => {
      if (!fits(event)) return;
      event.preventDefault();
      box.classList.add("over");
    });
    box.addEventListener("dragleave", () => box.classList.remove("over"));
    box.addEventListener("drop", (event) => {
      box.classList.remove("over");
      if (!fits(event)) return;
      event.preventDefault();
      const part = event.dataTransfer.getData("application/x-part");
      const files = [...event.dataTransfer.files];
      if (files.length) use(files);
      else if (part !== "" && move) move(Number(part));
    });
  },

  async takeIn(file) {
    try {
      location.search = `?session=${encodeURIComponent((await api.takeIn(file)).session)}`;
    } catch (error) {
      await this.failed(error);
    }
  },

  alternativesDialog(place) { dialogs.alternatives(this.view, place, this); },
  againDialog(place) { dialogs.again(this.view, place, this); },
  insertDialog(place) { dialogs.insert(place, this); },
};

// ---- The layout ----

function showLayout(layout) {
  const isKnown = layout !== "" && LAYOUTS.some(([value]) => value === layout);
  for (const each of $("layouts").children) each.setAttribute("aria-checked", String(each.dataset.layout === (isKnown ? layout : "")));
  $("layout").hidden = isKnown;
  if (!isKnown && layout) $("layout").value = layout;
  for (const each of $("layouts").children) each.tabIndex = each.getAttribute("aria-checked") === "true" ? 0 : -1;
}

function chosenLayout() {
  const chosen = $("layouts").querySelector('[aria-checked="true"]')?.dataset.layout ?? "auto";
  return chosen || $("layout").value.trim() || "auto";
}

function setUpLayouts() {
  for (const [layout, label] of LAYOUTS) {
    if (!studio.model.images && layout.includes("I")) continue;
    $("layouts").append(button(label, () => {
      showLayout(layout);
      if (!layout) $("layout").focus();
    }, { class: "", role: "radio", "data-layout": layout }));
  }
  $("layouts").addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!by) return;
    const all = [...$("layouts").children];
    const next = all[(all.indexOf(document.activeElement) + by + all.length) % all.length];
    event.preventDefault();
    showLayout(next.dataset.layout);
    next.focus();
  });
}

// ---- What is kept of a page that closes ----

function setDraft(text) {
  $("words").value = text;
  keepDraft();
}

function keepDraft() {
  const key = `draft-${studio.view.session}`;
  try {
    $("words").value ? localStorage.setItem(key, $("words").value) : localStorage.removeItem(key);
  } catch {}
}

function remember(name) {
  history.replaceState(null, "", `?session=${encodeURIComponent(name)}`);
  try {
    $("words").value = localStorage.getItem(`draft-${name}`) ?? $("words").value;
  } catch {}
}

// The studio has gone, or its machine: everything is on disk up to the last part.
async function waitForStudio() {
  if ($("notices").querySelector(`[data-id="${LOST}"]`)) return;
  notice("The studio does not answer. What was finished is saved; the page goes on as soon as it is back.", LOST);
  while (true) {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    if (await api.health().then(() => true, () => false)) break;
  }
  dropNotice(LOST);
  studio.busy = false;
  live.end();
  await studio.reload();
  say("The studio is back");
}

// ---- The keyboard ----

function onKey(event) {
  if ($("dialog").open) return;
  const isTyping = event.target.matches("textarea, input, select");
  const isControl = event.ctrlKey || event.metaKey;
  if (event.key === "Escape" && studio.busy) return studio.stop();
  if (isControl && event.key.toLowerCase() === "z" && !isTyping) {
    event.preventDefault();
    return $(event.shiftKey ? "redo" : "undo").click();
  }
  if (isTyping || isControl) return;
  const part = event.target.closest(".part");
  const isOnPart = part && event.target === part;
  if (event.key === "?") return dialogs.keys();
  if (event.key.toLowerCase() === "w") {
    event.preventDefault();
    return $("words").focus();
  }
  if (isOnPart && onPartKey(event, Number(part.dataset.place))) event.preventDefault();
  else if (!part && event.key === "ArrowDown" && event.target === $("parts")) partAt(0)?.focus();
}

// Answers whether the key meant something.
function onPartKey(event, place) {
  const part = studio.view.parts[place];
  const isFree = !studio.busy;
  const edit = () => (part.type === "text" ? studio.edit(place) : studio.choosePicture((files) => studio.replacePicture(place, files)));
  const does = {
    ArrowUp: () => (event.altKey ? isFree && studio.move(place, place - 1) : partAt(place - 1)?.focus()),
    ArrowDown: () => (event.altKey ? isFree && studio.move(place, place + 1) : (partAt(place + 1) ?? $("words")).focus()),
    ArrowLeft: () => isFree && part.alternatives.count > 1 && studio.step(place, -1),
    ArrowRight: () => isFree && part.alternatives.count > 1 && studio.step(place, 1),
    Enter: () => isFree && edit(),
    e: () => isFree && edit(),
    r: () => isFree && studio.again(place, {}),
    R: () => studio.againDialog(place),
    i: () => studio.insertDialog(place),
    b: () => isFree && studio.act("branch", { index: place }, place),
    Delete: () => isFree && studio.remove(place),
  }[event.key];
  if (!does) return false;
  does();
  return true;
}

// ---- Begin ----

async function begin() {
  setUpDialog();
  studio.model = await api.model();
  $("model").textContent = `with ${studio.model.name}`;
  for (const count of [1, 2, 3, 4, 6]) $("candidates").append(el("option", { value: count }, String(count)));
  setUpLayouts();
  const name = new URLSearchParams(location.search).get("session");
  let view = null;
  if (name) view = await api.session(name).catch((error) => (notice(error.message), null));
  view ??= await api.newSession();
  remember(view.session);
  studio.show(view);
  if (view.busy) studio.follow();
  $("undo").onclick = () => studio.act("undo", {});
  $("redo").onclick = () => studio.act("redo", {});
  $("branches").onclick = () => dialogs.branches(studio.view, studio);
  $("settings").onclick = () => dialogs.settings(studio.view, studio);
  $("export").onclick = () => dialogs.exports_(studio.view);
  $("sessions").onclick = () => dialogs.sessions(studio.view, studio).catch((error) => studio.failed(error));
  $("keys").onclick = dialogs.keys;
  $("title").onchange = () => studio.act("rename", { title: $("title").value });
  $("title").onkeydown = (event) => event.key === "Enter" && $("title").blur();
  $("add-text").onclick = () => studio.addWords();
  $("add-picture").onclick = () => studio.choosePicture((files) => studio.addPictures(files));
  $("continue").onclick = () => studio.continue();
  $("stop").onclick = () => studio.stop();
  $("words").oninput = keepDraft;
  $("words").onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) studio.continue();
    if (event.key === "ArrowUp" && !$("words").value) partAt(studio.view.parts.length - 1)?.focus();
  };
  studio.acceptDrop($("composer"), (files) => studio.addPictures(files), (from) => studio.move(from, studio.view.parts.length - 1));
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length || $("dialog").open) return;
    event.preventDefault();
    studio.addPictures(files);
  });
  document.addEventListener("keydown", onKey);
  document.documentElement.dataset.ready = "true";
}

begin().catch((error) => notice(`The studio cannot begin: ${error.message}`));
