// What the model makes at this moment: text as it comes, pictures as they emerge, lanes side by side.

import { $, el, picture, say } from "./dom.js";
import { partAt } from "./parts.js";

let lanes = [];

export function begin(message, total) {
  const isWithin = message.rest === "keep" && message.place < total;
  lanes = Array.from({ length: message.lanes }, (_, number) =>
    el("div", { class: "lane", role: "group", "aria-label": message.lanes > 1 ? `Candidate ${number + 1}` : "New" }),
  );
  const box = el("div", { class: "lanes" }, ...lanes);
  for (let place = message.place; place < (isWithin ? message.place + 1 : total); place++) partAt(place)?.classList.add("fading");
  if (isWithin) partAt(message.place).append(box);
  else {
    $("live").replaceChildren(box);
    $("live").hidden = false;
  }
  say("The model begins");
  return box;
}

export function show(message) {
  const lane = lanes[message.lane];
  if (!lane) return;
  const last = lane.lastElementChild;
  switch (message.type) {
    case "start text":
      lane.append(el("p", { class: "writing", dir: "auto", "data-place": message.place }));
      say("Writing");
      break;
    case "text":
      last.append(message.text);
      break;
    case "start image":
      last?.classList.remove("writing");
      lane.append(el("div", { class: "picture", "data-place": message.place }, el("div", { class: "canvas" }), el("progress", { "aria-label": "Drawing", max: 1, value: 0 })));
      say("Drawing a picture");
      break;
    case "preview":
      replacePicture(last, message.src, "A picture that emerges");
      last.querySelector("progress").value = message.step / message.steps;
      break;
    case "image":
      replacePicture(last, message.src, "A new picture");
      last.querySelector("progress")?.remove();
      say("A picture is done");
      break;
    case "lane":
      last?.classList.remove("writing");
  }
}

export function end() {
  lanes = [];
  $("live").replaceChildren();
  $("live").hidden = true;
}

function replacePicture(box, src, label) {
  const shown = box.querySelector("img");
  if (shown) {
    shown.src = src;
    shown.alt = label;
  } else box.querySelector(".canvas").replaceWith(picture(src, label));
}
