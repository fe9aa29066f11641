"use strict";
// The theme button, and the browser of examples: filters over window.EXAMPLES, cards a page at a time.
(function () {
  const PAGE = 60;
  const byId = (id) => document.getElementById(id);
  const themes = () => document.documentElement;

  function isDark() {
    const chosen = themes().dataset.theme;
    return chosen ? chosen === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function showTheme() {
    const button = byId("theme");
    button.textContent = isDark() ? "Light" : "Dark";
  }

  byId("theme").addEventListener("click", () => {
    themes().dataset.theme = isDark() ? "light" : "dark";
    showTheme();
  });
  showTheme();

  // On paper everything is open.
  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });

  const sets = window.EXAMPLES || [];
  if (!sets.length || !byId("list")) return;
  let shown = [];
  let drawn = 0;

  // Every text from the data becomes a text node: nothing of it is read as HTML.
  function element(tag, text, name) {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (name) node.className = name;
    return node;
  }

  function fill(select, texts) {
    select.replaceChildren(...texts.map((text, place) => {
      const option = element("option", text);
      option.value = String(place);
      return option;
    }));
  }

  const current = () => sets[Number(byId("dataset").value) || 0];

  function chooseSet() {
    const set = current();
    fill(byId("first"), set.runs.map((run) => run.name));
    fill(byId("second"), set.runs.map((run) => run.name));
    const clip = set.runs.findIndex((run) => run.kind === "clip");
    byId("second").value = String(clip >= 0 ? clip : Math.min(1, set.runs.length - 1));
    byId("class-names").replaceChildren(...set.names.map((name) => {
      const option = element("option");
      option.value = name;
      return option;
    }));
    byId("class").value = "";
    search();
  }

  function search() {
    const set = current();
    const wanted = byId("class").value.trim().toLowerCase();
    const exact = set.names.findIndex((name) => name.toLowerCase() === wanted);
    const text = byId("search").value.trim().toLowerCase();
    const models = ["first", "second"].map((id) => [set.runs[Number(byId(id).value)], byId(`${id}-right`).value]);
    shown = [];
    for (let place = 0; place < set.ids.length; place++) {
      const label = set.names[set.labels[place]];
      if (wanted && (exact >= 0 ? set.labels[place] !== exact : !label.toLowerCase().includes(wanted))) continue;
      if (models.some(([run, right]) => right !== "" && run.right[place] !== Number(right))) continue;
      if (text) {
        const texts = [set.ids[place], label, ...set.runs.map((run) => run.answers[place] || "")];
        if (!texts.some((one) => one.toLowerCase().includes(text))) continue;
      }
      shown.push(place);
    }
    byId("count").textContent =
      `${shown.length.toLocaleString("en")} of ${set.ids.length.toLocaleString("en")} examples`;
    byId("list").replaceChildren();
    drawn = 0;
    more();
  }

  function more() {
    const set = current();
    const end = Math.min(shown.length, drawn + PAGE);
    const cards = document.createDocumentFragment();
    for (; drawn < end; drawn++) cards.append(card(set, shown[drawn]));
    byId("list").append(cards);
    byId("more").hidden = drawn >= shown.length;
  }

  function card(set, place) {
    const label = set.names[set.labels[place]];
    const node = element("article", undefined, "example");
    const image = element("img");
    image.loading = "lazy";
    image.alt = `image of the class ${label}`;
    image.width = image.height = 96;
    const head = element("div");
    head.append(element("h3", label), element("p", set.ids[place], "id"));
    if (set.thumbnails[place]) {
      image.src = set.thumbnails[place];
      node.append(image, head);
    } else {
      node.append(element("span", "no image", "id"), head);
    }
    const answers = element("ul");
    for (const run of set.runs) {
      if (run.answers[place] === null) continue;
      const line = element("li", undefined, run.right[place] ? "right" : "wrong");
      line.append(element("span", `${run.name}: `, "model"), element("span", run.answers[place] || "(empty)"));
      line.title = run.right[place] ? "right" : "wrong";
      answers.append(line);
    }
    node.append(answers);
    for (const run of set.runs) if (run.top && run.top[place]) node.append(top(set, run, place));
    return node;
  }

  function top(set, run, place) {
    const box = element("div", undefined, "top");
    box.append(element("div", `${run.name} (${run.calibrated})`, "title"));
    for (const [name, percent] of run.top[place]) {
      const bar = element("div", undefined, "bar");
      bar.style.width = `${percent}%`;
      // The true class is in bold.
      const isTrue = name === set.labels[place];
      box.append(element("div", set.names[name], isTrue ? "true" : ""), bar, element("div", `${percent}%`, "percent"));
    }
    if (run.ancestors && run.ancestors[place]) {
      box.append(element("div", `at least 90% certain: ${run.ancestors[place]}`, "title"));
    }
    return box;
  }

  fill(byId("dataset"), sets.map((set) => set.title));
  byId("dataset").addEventListener("change", chooseSet);
  for (const id of ["first", "second", "first-right", "second-right"]) byId(id).addEventListener("change", search);
  let waiting;
  for (const id of ["class", "search"]) {
    byId(id).addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 120); });
  }
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () => setTimeout(chooseSet));
  byId("more").addEventListener("click", more);
  chooseSet();
})();
