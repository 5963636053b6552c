// Elements out of plain values. Texts are set as text, never as markup: what a model or a person writes stays text.

export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const $ = (id) => document.getElementById(id);

export function button(label, action, attributes = {}) {
  return el("button", { type: "button", class: "plain", onclick: action, ...attributes }, label);
}

export function say(text) {
  // The same words again are announced again.
  $("status").textContent = "";
  requestAnimationFrame(() => ($("status").textContent = text));
}

export function notice(text, id = "") {
  if (id) dropNotice(id);
  const box = el("div", { class: "notice", "data-id": id }, el("span", {}, text));
  box.append(button("✕", () => box.remove(), { "aria-label": "Close this notice" }));
  $("notices").append(box);
  while ($("notices").children.length > 4) $("notices").firstChild.remove();
}

export function dropNotice(id) {
  for (const box of $("notices").querySelectorAll(`[data-id="${id}"]`)) box.remove();
}

export function picture(src, label) {
  const image = el("img", { src, alt: label, draggable: "false" });
  // Small images keep their pixels as squares.
  const sharpen = () => image.classList.toggle("crisp", Math.max(image.naturalWidth, image.naturalHeight) <= 128);
  image.addEventListener("load", sharpen);
  return image;
}

let opener = null;

export function openDialog(title, ...body) {
  opener ??= document.activeElement;
  $("dialog-title").textContent = title;
  $("dialog-body").replaceChildren(...body);
  if (!$("dialog").open) $("dialog").showModal();
}

export function closeDialog() {
  $("dialog").close();
}

export function setUpDialog() {
  $("dialog-close").addEventListener("click", closeDialog);
  $("dialog").addEventListener("click", (event) => {
    if (event.target === $("dialog")) closeDialog();
  });
  $("dialog").addEventListener("close", () => {
    if (opener?.isConnected) opener.focus();
    opener = null;
  });
}
