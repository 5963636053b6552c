// Dialogs: alternatives, regeneration with choices, branches, settings, export, sessions, keys.

import * as api from "./api.js";
import { button, closeDialog, el, openDialog, picture } from "./dom.js";
import { choice, indices } from "./parts.js";

export function alternatives(view, place, studio) {
  const part = view.parts[place];
  const { nodes, place: shown } = part ? part.alternatives : view.onwards;
  const later = (node) => (node.below ? `, ${node.below} more behind` : "");
  const choices = nodes.map((node, number) =>
    choice(node, `${number + 1} of ${nodes.length}${node.generated ? " ✦" : ""}${later(node)}`, () => {
      closeDialog();
      studio.act("choose", { node: node.node }, place);
    }, number === shown),
  );
  openDialog(`Part ${place + 1}: alternatives`, el("div", { class: "choices", role: "radiogroup", "aria-label": "Alternatives" }, ...choices));
}

export function again(view, place, studio) {
  const part = view.parts[place];
  const images = view.parts.slice(0, place).filter((each) => each.type === "image");
  const count = el("select", { id: "again-count" }, ...[1, 2, 3, 4, 6].map((n) => el("option", { value: n }, String(n))));
  const rest = el(
    "select",
    { id: "again-rest" },
    el("option", { value: "keep" }, "keep them"),
    el("option", { value: "again" }, "make generated ones again"),
    el("option", { value: "auto" }, "let the model go on its own way"),
  );
  const seed = el("input", { id: "again-seed", type: "number", min: 0, step: 1, placeholder: part.seed ?? "new" });
  const chosen = new Set(indices(view) ?? []);
  const thumbs = images.map((image, number) => {
    const thumb = el("button", { type: "button", class: "choice", "aria-pressed": String(chosen.has(number)), "aria-label": `Picture ${number + 1} feeds it` }, picture(image.src, ""), el("small", {}, `Picture ${number + 1}`));
    thumb.addEventListener("click", () => {
      chosen.has(number) ? chosen.delete(number) : chosen.add(number);
      thumb.setAttribute("aria-pressed", String(chosen.has(number)));
    });
    return thumb;
  });
  const go = () => {
    const settings = {};
    if (seed.value !== "") settings.seed = Number(seed.value);
    const picked = [...chosen].filter((n) => n < images.length).sort((a, b) => a - b);
    if (picked.length) settings.context_images = picked.join(",");
    closeDialog();
    studio.again(place, { candidates: Number(count.value), rest: rest.value, settings });
  };
  const body = [
    field("Candidates side by side", count),
    field("The parts behind it", rest),
    field("Seed", seed, "The same seed makes the same part; empty is a new one."),
  ];
  if (thumbs.length && studio.model.images)
    body.push(
      el("h3", {}, "Earlier pictures that feed it"),
      el("p", { class: "small faint" }, "None chosen: the model's own rule."),
      el("div", { class: "choices" }, ...thumbs),
    );
  body.push(el("div", { class: "row" }, button("Regenerate", go, { class: "strong" })));
  openDialog(`Regenerate part ${place + 1}`, ...body);
}

export function insert(place, studio) {
  const words = el("textarea", { rows: 3, "aria-label": "Words to insert" });
  const go = () => {
    if (!words.value.trim()) return;
    closeDialog();
    studio.act("insert", { index: place, parts: [{ type: "text", text: words.value }] }, place);
  };
  words.addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && go());
  openDialog(`Insert before part ${place + 1}`, el("div", { class: "insert" }, words), el("div", { class: "row" }, button("Insert", go, { class: "strong" })));
  words.focus();
}

export function branches(view, studio) {
  const items = view.branches.toReversed().map((branch) =>
    el(
      "li",
      {},
      choice(branch.begins[0], `leaves at part ${branch.from + 1}, ${branch.parts} parts`, () => {
        closeDialog();
        studio.act("choose", { node: branch.tip }, branch.from);
      }, false),
    ),
  );
  const none = el("p", {}, "Nothing is hidden. What you change or make again is kept here; nothing is ever overwritten.");
  openDialog("Hidden branches", items.length ? el("ul", { class: "choices" }, ...items) : none);
}

export function settings(view, studio) {
  const groups = studio.model.form.flatMap(({ group, fields }) => [el("h3", {}, group), ...fields.map((each) => setting(each, view, studio))]);
  const reset = button("All as the model has them", async () => {
    const changes = Object.fromEntries(Object.keys(view.settings).map((name) => [name, null]));
    if (await studio.act("settings", { changes })) settings(studio.view, studio);
  });
  openDialog("Settings", el("p", { class: "small faint" }, "They begin as the model's own, and belong to this document."), ...groups, el("div", { class: "row" }, reset));
}

function setting(each, view, studio) {
  const given = view.settings[each.name];
  const own = each.own ?? "own";
  let input;
  if (each.kind === "choice" || each.kind === "switch") {
    const options = each.kind === "switch" ? ["on", "off"] : each.choices;
    const ownText = each.kind === "switch" ? (each.own ? "on" : "off") : own;
    const value = each.kind === "switch" ? (given === undefined ? "" : given ? "on" : "off") : (given ?? "");
    input = el("select", {}, el("option", { value: "" }, `${ownText} (the model's own)`), ...options.map((name) => el("option", { value: name, selected: name === value }, name)));
  } else {
    const isNumber = each.kind === "number";
    input = el("input", { type: isNumber ? "number" : "text", placeholder: own, value: given ?? "", min: isNumber ? each.low : null, max: isNumber ? each.high : null, step: isNumber ? each.step : null });
  }
  input.id = `setting-${each.name}`;
  input.addEventListener("change", async () => {
    const text = input.value;
    const value = text === "" ? null : each.kind === "number" ? Number(text) : each.kind === "switch" ? text === "on" : text;
    if (!(await studio.act("settings", { changes: { [each.name]: value } }))) input.value = given ?? "";
  });
  return field(each.label, input, each.help);
}

function field(label, input, help = "") {
  input.id ||= `field-${label.replaceAll(" ", "-").toLowerCase()}`;
  return el("div", { class: "field" }, el("label", { for: input.id }, label), input, help ? el("small", {}, help) : null);
}

export function exports_(view) {
  const forms = [
    ["markdown", "Markdown", "story.md and its pictures, in an archive"],
    ["html", "Web page", "one file that needs nothing else"],
    ["pdf", "PDF", "pages to print"],
    ["comic", "Comic", "all panels in a grid, one PNG"],
    ["session", "Session", "everything, hidden branches too; `generate` reads it, and Sessions takes it in"],
  ];
  const items = forms.map(([form, name, about]) =>
    el("li", {}, el("a", { href: api.exportAddress(view.session, form), download: "", "data-form": form }, name), el("span", { class: "faint" }, ` – ${about}`)),
  );
  openDialog("Export", el("ul", {}, ...items));
}

export async function sessions(view, studio) {
  const list = await api.sessions();
  const items = list.map((each) =>
    el("li", {}, el("a", { href: `?session=${encodeURIComponent(each.name)}`, "aria-current": each.name === view.session ? "page" : null }, each.title || each.name), el("span", { class: "faint small" }, ` ${new Date(each.changed * 1000).toLocaleString()}`)),
  );
  const file = el("input", { type: "file", accept: ".zip,application/zip", hidden: true });
  file.addEventListener("change", () => file.files.length && studio.takeIn(file.files[0]));
  const row = el("div", { class: "row" }, el("a", { href: "?", id: "new-session" }, "New session"), button("Open a saved session …", () => file.click(), { class: "" }), file);
  openDialog("Sessions", row, items.length ? el("ul", {}, ...items) : el("p", { class: "faint" }, "None is saved yet; one is from its first part on."));
}

const KEYS = [
  ["↑ ↓", "from part to part"],
  ["← →", "step through the alternatives of a part"],
  ["R", "regenerate a part"],
  ["Shift+R", "regenerate with choices: candidates, seed, pictures that feed it"],
  ["E or Enter", "edit a text, replace a picture"],
  ["I", "insert words before a part"],
  ["B", "branch: go on another way from a part"],
  ["Alt+↑ Alt+↓", "move a part"],
  ["Delete", "delete a part"],
  ["W", "to your words at the end"],
  ["Ctrl+Enter", "continue; while editing: save and regenerate"],
  ["Ctrl+S", "while editing: save only"],
  ["Ctrl+Z, Ctrl+Shift+Z", "undo, redo"],
  ["Esc", "stop the model, leave an editor, close a dialog"],
];

export function keys() {
  openDialog("Keys", el("dl", {}, ...KEYS.flatMap(([key, what]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, what)])));
}
