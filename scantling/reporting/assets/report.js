// Draws every figure into its box, and again in other colours when the page turns dark or goes to paper.
(function () {
  "use strict";
  const boxes = Array.from(document.querySelectorAll(".plot"));
  const { colours, dark, draw } = plots;
  for (const box of boxes) draw(box, JSON.parse(document.getElementById(box.id + "-data").textContent));
  const recolour = (isDark, width) => boxes.forEach((box) =>
    Plotly.relayout(box, Object.assign(colours(box.layout, isDark), width ? { width: width(box), autosize: false } : {})));
  dark.addEventListener("change", () => recolour(dark.matches));
  window.addEventListener("beforeprint", () => recolour(false, (box) => {
    const panels = box.closest(".panels");
    return panels && panels.dataset.panels !== "1" ? 325 : 670;
  }));
  window.addEventListener("afterprint", () => boxes.forEach((box) =>
    Plotly.relayout(box, Object.assign(colours(box.layout, dark.matches), { width: null, autosize: true }))));
})();
