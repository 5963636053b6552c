// The document: its parts in order, each with its tools, and the gaps between them.

import { $, button, el, picture } from "./dom.js";

export function renderParts(view, studio) {
  const images = view.parts.filter((part) => part.type === "image");
  const items = view.parts.flatMap((part, place) => [gap(place, studio), item(part, place, view, images, studio)]);
  $("parts").replaceChildren(...items);
  renderOnwards(view, studio);
}

export const partAt = (place) => $("parts").querySelector(`.part[data-place="${place}"]`);

function item(part, place, view, images, studio) {
  const { count, place: shown } = part.alternatives;
  const made = part.generated ? "made by the model" : "given";
  const several = count > 1 ? `, alternative ${shown + 1} of ${count}` : "";
  const kind = part.type === "text" ? "text" : "picture";
  const number = images.indexOf(part);
  const box = el("li", {
    class: `part ${part.type} ${part.generated ? "generated" : "given"} ${count > 1 ? "several" : ""}`,
    tabindex: "0",
    role: "group",
    "data-place": place,
    "aria-label": `Part ${place + 1} of ${view.parts.length}, ${kind}, ${made}${several}`,
  });
  if (part.role) box.append(el("div", { class: "role" }, part.role));
  box.append(part.type === "text" ? words(part) : image(part, `Picture ${number + 1}, ${made}`));
  box.append(tools(part, place, view, number, studio));
  if (part.type === "image") studio.acceptDrop(box, (files) => studio.replacePicture(place, files));
  return box;
}

function words(part) {
  return el("p", { dir: "auto" }, part.text, part.generated ? star() : null);
}

function image(part, label) {
  return el("div", { class: "picture" }, picture(part.src, label), part.generated ? star() : null);
}

const star = () => el("span", { class: "star", title: "made by the model", "aria-hidden": "true" }, " ✦");

function tools(part, place, view, number, studio) {
  const { count, place: shown } = part.alternatives;
  const bar = el("div", { class: "tools", role: "toolbar", "aria-label": `Part ${place + 1}` });
  const add = (label, title, action, more = {}) =>
    bar.append(button(label, action, { "aria-label": title, title, ...more }));
  if (count > 1) bar.append(steps(place, count, shown, studio));
  const canRedo = part.role === null || part.role === "assistant";
  if (canRedo && (part.type === "text" || studio.model.images)) {
    add("↻ Again", `Regenerate part ${place + 1} (R)`, () => studio.again(place, {}));
    add("▾", `Regenerate part ${place + 1} with choices`, () => studio.againDialog(place), { "aria-haspopup": "dialog" });
  }
  if (part.type === "text") add("✎ Edit", `Edit part ${place + 1} (E)`, () => studio.edit(place));
  else add("⇄ Replace", `Replace picture ${number + 1} (E)`, () => studio.choosePicture((files) => studio.replacePicture(place, files)));
  if (part.type === "image" && studio.model.images) bar.append(feeds(view, number, studio));
  add("Branch", `Branch: go on another way from part ${place + 1} (B)`, () => studio.act("branch", { index: place }, place));
  add("↑", `Move part ${place + 1} up (Alt+↑)`, () => studio.move(place, place - 1), { disabled: place === 0 });
  add("↓", `Move part ${place + 1} down (Alt+↓)`, () => studio.move(place, place + 1), { disabled: place === view.parts.length - 1 });
  add("✕", `Delete part ${place + 1} (Delete)`, () => studio.remove(place));
  const handle = el("span", { class: "handle", draggable: "true", title: "Drag to another place", "aria-hidden": "true" }, "⠿");
  handle.addEventListener("dragstart", (event) => {
    event.dataTransfer.setData("application/x-part", String(place));
    event.dataTransfer.effectAllowed = "move";
  });
  bar.append(handle);
  return bar;
}

function steps(place, count, shown, studio) {
  return el(
    "span",
    { class: "steps" },
    button("‹", () => studio.step(place, -1), { "aria-label": `Previous alternative of part ${place + 1}`, disabled: shown === 0 }),
    button(`${shown + 1}/${count}`, () => studio.alternativesDialog(place), {
      "aria-label": `Alternative ${shown + 1} of ${count}: all side by side`,
      "aria-haspopup": "dialog",
    }),
    button("›", () => studio.step(place, 1), { "aria-label": `Next alternative of part ${place + 1}`, disabled: shown === count - 1 }),
  );
}

// Which earlier pictures feed new ones: the model's rule until somebody chooses.
function feeds(view, number, studio) {
  const chosen = indices(view);
  const isOn = chosen === null ? view.settings.context_images !== "previous" : chosen.includes(number);
  const rule = chosen === null ? " (the model's rule)" : "";
  return button(isOn ? "◉ feeds new" : "○ does not feed", () => studio.toggleFeeds(number), {
    "aria-pressed": String(chosen !== null && isOn),
    "aria-label": `Picture ${number + 1} feeds new pictures: ${isOn ? "yes" : "no"}${rule}`,
    title: `Whether new pictures look at this one${rule}`,
  });
}

export function indices(view) {
  const chosen = view.settings.context_images;
  return /^[\d, ]+$/.test(chosen ?? "") ? chosen.split(",").map(Number) : null;
}

function gap(place, studio) {
  const box = el(
    "li",
    { class: "gap", role: "none" },
    el(
      "div",
      {},
      button("+ Words", () => studio.insertDialog(place), { "aria-label": `Insert words before part ${place + 1}` }),
      button("+ Picture", () => studio.choosePicture((files) => studio.insertPictures(place, files)), {
        "aria-label": `Insert a picture before part ${place + 1}`,
      }),
    ),
  );
  studio.acceptDrop(box, (files) => studio.insertPictures(place, files), (from) => studio.move(from, from < place ? place - 1 : place));
  return box;
}

// Behind the last part: what once continued it, and is hidden now.
function renderOnwards(view, studio) {
  const { count, place } = view.onwards;
  $("onwards").replaceChildren();
  if (place !== null || !count) return;
  const text = count === 1 ? "It went on from here once (hidden)" : `It went on from here in ${count} ways (hidden)`;
  $("onwards").append(el("span", { class: "faint" }, `${text} `), button("Show", () => studio.alternativesDialog(view.parts.length)));
}

export function choice(part, label, action, isOn) {
  const content = part.type === "text" ? el("span", { class: "words", dir: "auto" }, part.text) : picture(part.src, "");
  return el(
    "button",
    { type: "button", class: "choice", role: "radio", "aria-checked": String(isOn), "aria-label": `${label}: ${part.type === "text" ? part.text.slice(0, 120) : "picture"}`, onclick: action },
    content,
    el("small", { class: "faint" }, label),
  );
}
