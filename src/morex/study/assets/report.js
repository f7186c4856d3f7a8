"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const chosen = new Set();

  // Point labels need room; on a phone the coloured chips above the figures name the points.
  function fitted(layout) {
    const narrow = window.innerWidth < 560;
    const copy = structuredClone(layout);
    if (narrow) {
      copy.annotations = (copy.annotations || []).filter((note) => note.name === "fixed");
      copy.font.size = 11.5;
    }
    return copy;
  }

  function draw() {
    for (const plot of plots) {
      const figure = figures[plot.dataset.figure];
      Plotly.react(plot, figure.data, fitted(figure.layout), { responsive: true, displayModeBar: false });
    }
    fade();
  }

  function fade() {
    const shown = (name) => chosen.size === 0 || !name || chosen.has(name);
    for (const plot of plots) {
      const named = plot.data.some((trace) => trace.meta);
      if (named) Plotly.restyle(plot, { opacity: plot.data.map((trace) => (shown(trace.meta) ? 1 : 0.1)) });
    }
    for (const part of document.querySelectorAll("[data-variant]")) {
      part.classList.toggle("dimmed", !shown(part.dataset.variant));
    }
  }

  for (const chip of document.querySelectorAll(".chip")) {
    chip.addEventListener("click", () => {
      const name = chip.dataset.name;
      if (!chosen.delete(name)) chosen.add(name);
      chip.setAttribute("aria-pressed", String(chosen.has(name)));
      fade();
    });
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...table.tBodies[0].rows];
        const key = (row) => row.cells[column].dataset.value;
        rows.sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (x === "" || y === "") return (x === "") - (y === "");  // absent numbers stay at the end
          const order = column === 0 ? x.localeCompare(y) : Number(x) - Number(y);
          return up ? order : -order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  let narrow = window.innerWidth < 560;
  window.addEventListener("resize", () => {
    if (narrow !== window.innerWidth < 560) {
      narrow = !narrow;
      draw();
    }
  });
  draw();
})();
