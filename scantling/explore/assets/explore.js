// The fields make a query, the query is the page's address, and the server's answer to it fills the page.
(function () {
  "use strict";
  const WAIT = 60, SETTLE = 300;  // milliseconds: before asking while a slider moves; before a state enters the history
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (selector, within = document) => within.querySelector(selector);
  const choice = (key) => find(`[data-choice="${key}"] select`);
  const slider = (key) => find(`[data-slider="${key}"]`);
  const keys = [...document.querySelectorAll("[data-slider], [data-choice]")]
    .map((box) => box.dataset.slider || box.dataset.choice).filter((key) => key !== "goal" && key !== "amount");
  const goalKeys = [...choice("goal").options].map((option) => option.value);
  let amounts = {}, wanted = null, busy = false, timer = 0, settling = 0;

  // --- fields ---------------------------------------------------------------------------------------------------------

  const own = (key) => (key in data.own ? data.own[key] : "");
  const stops = (key) => {
    if (key === "target.loss") return data.loss[choice("law").value] || data.loss[""];
    return data.stops[key];
  };
  const field = (key) => (slider(key) ? find("input[type=text]", slider(key)) : choice(key));
  const sliderKey = (box) => (box.dataset.slider === "amount" ? choice("goal").value : box.dataset.slider);

  function place(box) {  // the slider at the stop nearest to the field's value
    const known = stops(sliderKey(box)), range = find("input[type=range]", box), text = find("input[type=text]", box).value;
    let at = known.findIndex(([value]) => value === text);
    if (at < 0 && Number(text) > 0) {
      const far = ([value]) => (Number(value) > 0 ? Math.abs(Math.log(Number(value) / Number(text))) : Infinity);
      at = known.reduce((best, stop, i) => (far(stop) < far(known[best]) ? i : best), 0);
    }
    range.max = known.length - 1;
    if (at >= 0) range.value = at;
    const found = known.find(([value]) => value === text);
    say(box, found ? found[1] : "");
  }
  function say(box, label) {
    find("output", box).textContent = label;
    find("input[type=range]", box).setAttribute("aria-valuetext", label || find("input[type=text]", box).value);
  }

  function state() {  // the fields that differ from the plan, as a query
    const query = new URLSearchParams(), goal = choice("goal").value, amount = field("amount").value.trim();
    const sameGoal = goal === data.goal && amount === own(goal);
    if (!sameGoal) query.set(goal, amount);
    for (const key of keys) {
      const value = field(key).value.trim(), box = field(key).closest(".control");
      const differs = value !== own(key) && !field(key).disabled;
      if (differs && value !== "") query.set(key, value);
      box.classList.toggle("differs", differs);
    }
    slider("amount").classList.toggle("differs", !sameGoal);
    return query.toString();
  }

  function load(search) {  // the fields as an address says
    const query = new URLSearchParams(search), goal = goalKeys.find((key) => query.has(key)) || data.goal;
    choice("goal").value = goal;
    for (const key of keys) field(key).value = query.has(key) ? query.get(key) : own(key);
    field("amount").value = query.has(goal) ? query.get(goal) : own(goal);
    settle();
  }
  function settle() {  // what follows from the fields
    find("label", slider("amount")).textContent = data.names[choice("goal").value];
    const kind = choice("goal").value.split(".")[0], minimize = choice("minimize");
    minimize.options[0].textContent = data.minimize[kind];
    minimize.disabled = kind === "budget";
    if (minimize.disabled) minimize.value = "";
    else if (minimize.value === "") minimize.value = own("minimize");
    document.querySelectorAll("[data-slider]").forEach(place);
    state();
  }

  // --- asking: one question at a time, and always the latest one next ---------------------------------------------------

  function ask(query, draft = false) {
    wanted = { query, draft };
    clearTimeout(timer);
    timer = setTimeout(run, WAIT);
  }
  async function run() {
    if (busy) return;
    busy = true;
    document.body.classList.add("waiting");
    while (wanted !== null) {
      const { query, draft } = wanted;
      wanted = null;
      let answer;
      try {
        const reply = await fetch((draft ? "draft?" : "answer?") + query);
        answer = await reply.json();
      } catch (error) {
        answer = { faults: ["The server does not answer; start scantling explore again."] };
      }
      if (!(answer.draft && answer.faults)) show(answer, query);  // a part of the space may hold nothing where all of it does
    }
    busy = false;
    document.body.classList.remove("waiting");
  }

  function show(answer, query) {
    const main = find("#answer"), bad = "faults" in answer;
    main.classList.toggle("stale", bad);
    find("#fault").hidden = !bad;
    find("#headline").hidden = bad;
    find("#yaml").href = "plan.yaml?" + query;
    find("#json").href = "plan.json?" + query;
    find("#json").toggleAttribute("aria-disabled", bad);
    if (answer.command) find("#command").textContent = answer.command;
    if (answer.shown && wanted === null && query === state()) {
      document.querySelectorAll("[data-slider]").forEach((box) => {
        if (answer.shown[sliderKey(box)]) say(box, answer.shown[sliderKey(box)]);
      });
    }
    if (bad) {
      const before = main.classList.contains("empty") ? "" : "; greyed below is the last answer";
      const said = ["No shape to show" + before, ...answer.faults].map((text) => Object.assign(document.createElement("p"), { textContent: text }));
      find("#fault").replaceChildren(...said);
    } else {
      amounts = answer.amounts;
      main.classList.remove("empty");
      for (const [name, html] of Object.entries(answer.parts)) {
        const box = document.getElementById(name);
        if (box.innerHTML !== html) box.innerHTML = html;
      }
      for (const [name, figure] of Object.entries(answer.figures)) {
        if (figure) plots.draw(document.getElementById(name), figure);
        else Plotly.purge(name);
      }
    }
    main.dataset.query = query;  // what is shown
    main.setAttribute("aria-busy", "false");
  }

  function changed() {  // a state was chosen: ask, and let it enter the history once it rests
    const query = state();
    ask(query);
    clearTimeout(settling);
    settling = setTimeout(() => {
      const address = query ? "?" + query : location.pathname;
      if (location.search !== (query ? "?" + query : "")) history.pushState(null, "", address);
    }, SETTLE);
  }

  // --- events -----------------------------------------------------------------------------------------------------------

  document.querySelectorAll("[data-slider]").forEach((box) => {
    const range = find("input[type=range]", box), text = find("input[type=text]", box);
    range.addEventListener("input", () => {
      const [value, label] = stops(sliderKey(box))[range.value];
      text.value = value;
      say(box, label);
      ask(state(), true);
    });
    range.addEventListener("change", changed);
    text.addEventListener("change", () => { place(box); changed(); });
  });
  document.querySelectorAll("[data-choice] select").forEach((list) => list.addEventListener("change", () => {
    const key = list.closest(".control").dataset.choice;
    if (key === "goal") field("amount").value = list.value === data.goal ? own(list.value) : amounts[list.value] || stops(list.value)[0][0];
    settle();
    changed();
  }));
  find("form").addEventListener("submit", (event) => event.preventDefault());
  find("#reset").addEventListener("click", () => { load(""); changed(); });
  window.addEventListener("popstate", () => { clearTimeout(settling); load(location.search); ask(state()); });
  plots.dark.addEventListener("change", () => document.querySelectorAll(".plot.js-plotly-plot").forEach((box) =>
    Plotly.relayout(box, plots.colours(box.layout, plots.dark.matches))));

  load(location.search);
  ask(location.search.slice(1));
})();
