"use strict";
// Draws the figures when they come into view, in the colours of the page; sorts tables.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 600px)");
  const touch = matchMedia("(hover: none)");
  const chosen = new Map();

  // Part of cividis, which the colour-blind read too, without the end that the page swallows.
  const SCALES = {
    light: ["#00204c", "#31446b", "#666970", "#958f78", "#c0a63c"],
    dark: ["#5d7fc4", "#8a8d94", "#b0a57a", "#d8c05a", "#ffe945"],
  };

  function mix(a, b, share) {
    const part = (hex, at) => parseInt(hex.slice(at, at + 2), 16);
    const at = (i) => Math.round(part(a, i) + (part(b, i) - part(a, i)) * share);
    return `rgb(${at(1)},${at(3)},${at(5)})`;
  }

  const scale = () => SCALES[dark.matches ? "dark" : "light"];

  // A whole number is one of the page's colours, a fraction a place on the scale.
  function color(given) {
    if (Number.isInteger(given)) return css(`--c${given % 8}`);
    const stops = scale();
    const place = Math.min(Math.max(given, 0), 1) * (stops.length - 1);
    const first = Math.min(Math.floor(place), stops.length - 2);
    return mix(stops[first], stops[first + 1], place - first);
  }

  function colorscale(name) {
    if (name === "balance")
      return [[0, css("--low")], [0.5, css("--neutral")], [1, css("--high")]];
    if (name === "overload")
      return [[0, css("--low")], [0.25, css("--neutral")], [0.5, css("--high")], [1, css("--higher")]];
    if (name === "amount") return [[0, css("--neutral")], [1, css("--high")]];
    const stops = scale();
    return stops.map((stop, i) => [i / (stops.length - 1), stop]);
  }

  function themed(trace) {
    const { color: given, ...rest } = trace;
    const made = { ...rest };
    if (given !== undefined) {
      const shade = color(given);
      made.line = { ...rest.line, color: shade };
      made.marker = { ...rest.marker, color: shade };
      if (rest.fill) made.fillcolor = shade.startsWith("#") ? `${shade}33` : shade;
    }
    if (typeof rest.colorscale === "string") made.colorscale = colorscale(rest.colorscale);
    if (rest.line && typeof rest.line.colorscale === "string")
      made.line = { ...rest.line, colorscale: colorscale(rest.line.colorscale) };
    if (rest.type === "parcoords") {
      const font = { color: css("--text"), size: 12 };
      Object.assign(made, { labelfont: font, tickfont: font, rangefont: font });
    }
    return made;
  }

  function axis(given, small) {
    return {
      gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"),
      automargin: true, nticks: small ? 5 : undefined, ...given,
      title: { standoff: 8, ...(given || {}).title },
    };
  }

  function layout(figure, view) {
    const given = figure.layout, small = narrow.matches;
    const legend = given.showlegend
      ? { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: small ? 10 : 12 } }
      : undefined;
    const lines = (given.shapes || []).map((shape) => ({
      ...shape, layer: "below", line: { color: css("--quiet"), width: 1, dash: "dash" },
      label: { ...shape.label, font: { size: 10, color: css("--quiet") } },
    }));
    const marked = lines.some((shape) => shape.yref === "paper");
    return {
      ...given, legend, shapes: lines, height: figure.height,
      xaxis: axis(view.x ? { ...given.xaxis, title: { text: view.x } } : given.xaxis, small),
      yaxis: axis(given.yaxis, small),
      margin: given.margin || { l: 48, r: 12, t: given.showlegend || marked ? 34 : 12, b: 40 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("--text"), size: 12, family: "inherit" },
      hoverlabel: {
        bgcolor: css("--page"), bordercolor: css("--line"), font: { color: css("--text") },
        namelength: -1,
      },
      dragmode: small ? false : "zoom",
      // Beside the legend there is no room for the tools, and a fill would hide the curves.
      modebar: {
        orientation: "v", bgcolor: "rgba(0,0,0,0)", color: css("--quiet"),
        activecolor: css("--text"),
      },
    };
  }

  function draw(box) {
    const figure = figures[box.dataset.chart];
    const view = figure.views[chosen.get(box) || 0];
    const options = {
      responsive: true, displaylogo: false, displayModeBar: narrow.matches || touch.matches ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    };
    return Plotly.react(box, view.traces.map(themed), layout(figure, view), options);
  }

  const drawn = new Set();
  const boxes = [...document.querySelectorAll("[data-chart]")];
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting || drawn.has(target)) continue;
        drawn.add(target);
        watcher.unobserve(target);
        draw(target);
      }
    },
    { rootMargin: "300px" },
  );
  for (const box of boxes) {
    watcher.observe(box);
    const select = box.parentElement.querySelector("select");
    if (select)
      select.addEventListener("change", () => {
        chosen.set(box, Number(select.value));
        draw(box);
      });
  }
  const again = () => drawn.forEach(draw);
  dark.addEventListener("change", again);
  narrow.addEventListener("change", again);
  // Paper has no scrolling: everything is drawn first.
  addEventListener("beforeprint", () => boxes.forEach((box) => drawn.add(box) && draw(box)));

  function sortBy(table, column, ascending) {
    const body = table.tBodies[0];
    const value = (row) => {
      const cell = row.cells[column];
      return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
    };
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      const numbers = [x, y].map((each) => typeof each === "number");
      if (numbers[0] !== numbers[1]) return numbers[0] ? -1 : 1; // What is missing comes last.
      const order = numbers[0] ? x - y : x.localeCompare(y, undefined, { numeric: true });
      return ascending ? order : -order;
    };
    body.append(...[...body.rows].sort(compare));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) =>
      head.addEventListener("click", () => {
        const ascending = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        sortBy(table, column, ascending);
      }),
    );
  }

  for (const button of document.querySelectorAll("button.copy"))
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.parentElement.querySelector("pre").textContent);
      button.textContent = "copied";
    });
})();
