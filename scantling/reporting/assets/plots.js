// Figures in the colours of the page, light or dark: `plots.draw(box, figure)`, again for the same box with other data.
const plots = (function () {
  "use strict";
  const config = {
    responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",  // nothing leaves the page
    displayModeBar: window.matchMedia("(hover: hover)").matches ? "hover" : false, modeBarButtons: [["toImage", "resetScale2d"]]
  };

  function colours(layout, isDark) {
    const ink = isDark ? "#e4e7eb" : "#1c1f23", soft = isDark ? "#a3abb6" : "#555c66", grid = isDark ? "#2b3038" : "#e8eaee";
    const changes = {
      "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font.color": ink, "font.size": 12,
      "font.family": "system-ui, sans-serif",
      "hoverlabel.bgcolor": isDark ? "#1d2127" : "#ffffff", "hoverlabel.font.color": ink, "hoverlabel.bordercolor": soft,
      "modebar.bgcolor": "rgba(0,0,0,0)", "modebar.color": soft, "modebar.activecolor": ink
    };
    for (const axis of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
      Object.assign(changes, {
        [axis + ".gridcolor"]: grid, [axis + ".linecolor"]: soft, [axis + ".tickcolor"]: soft, [axis + ".zerolinecolor"]: soft,
        [axis + ".title.font.size"]: 12
      });
    }
    return changes;
  }

  function assign(target, changes) {
    for (const [path, value] of Object.entries(changes)) {
      const keys = path.split("."), last = keys.pop();
      let at = target;
      for (const key of keys) at = at[key] = at[key] || {};
      at[last] = value;
    }
    return target;
  }

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const draw = (box, figure) =>
    Plotly.react(box, figure.data, assign(figure.layout, colours(figure.layout, dark.matches)), config);
  return { colours, dark, draw };
})();
