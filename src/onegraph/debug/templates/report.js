// Filters of long tables, and the flame picture's zoom. The report is whole without it.
"use strict";
for (const input of document.querySelectorAll("input[data-rows]")) {
  const rows = [...document.querySelectorAll(`#${input.dataset.rows} tbody tr`)];
  const words = rows.map((row) => row.textContent.toLowerCase());
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    rows.forEach((row, at) => { row.hidden = !words[at].includes(wanted); });
  });
}
for (const picture of document.querySelectorAll(".flame")) {
  const frames = [...picture.querySelectorAll(".frame")];
  const told = document.getElementById("told");
  const show = (frame) => { told.textContent = frame.querySelector("title").textContent; };
  let zoomed = null;
  const zoom = (left, width) => {
    for (const frame of frames) {
      const from = Math.max((Number(frame.dataset.left) - left) / width, 0);
      const upto = Math.min((Number(frame.dataset.left) + Number(frame.dataset.width) - left) / width, 1);
      frame.style.display = upto - from < 1e-6 ? "none" : "";
      frame.setAttribute("x", `${100 * from}%`);
      frame.setAttribute("width", `${100 * Math.max(upto - from, 0)}%`);
    }
  };
  const widen = (frame) => {
    zoomed = frame === zoomed ? null : frame; // the same frame again: back to the whole step
    zoom(zoomed ? Number(frame.dataset.left) : 0, zoomed ? Number(frame.dataset.width) : 1);
    show(frame);
  };
  for (const frame of frames) {
    frame.addEventListener("mouseenter", () => show(frame));
    frame.addEventListener("focus", () => show(frame));
    frame.addEventListener("click", () => widen(frame));
    frame.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); widen(frame); }
      if (event.key === "Escape") { zoomed = null; zoom(0, 1); }
    });
  }
}
// A link to something inside of a folded part opens it.
const unfold = () => {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = target || null; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  if (target) target.scrollIntoView();
};
addEventListener("hashchange", unfold);
unfold();
