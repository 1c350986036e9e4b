(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const names = data.questions.map((question) => question.name);

  // Answers are stored under the page and the rater, so that a reload or another rater loses nothing.
  const memory = new Map();
  const prefix = `side-by-side:${data.page}`;
  const read = (key) => {
    try {
      return localStorage.getItem(key);
    } catch {
      return memory.get(key) ?? null;
    }
  };
  const write = (key, text) => {
    memory.set(key, text);
    try {
      localStorage.setItem(key, text);
    } catch {
      byId("storage").hidden = false;
    }
  };

  const order = (rater) =>
    pairDraws.draw(data.draws, `${data.page}:${rater}`).map(({ number, isFirstLeft }) => {
      const [first, second] = data.pairs[number].sides;
      const [left, right] = isFirstLeft ? [first, second] : [second, first];
      return { ...data.pairs[number], left, right };
    });

  // `shownSince` is null until both files are loaded, and infinite while the page is hidden.
  let state, pairs, index, active, shownSince = null, isPaused = false, generation = 0;
  const save = () => write(`${prefix}:${state.rater.toLowerCase()}`, JSON.stringify(state));
  const answersOf = (pair) => (state.answers[pair.name] ??= { seconds: 0 });
  const isComplete = (pair) => names.every((name) => state.answers[pair.name]?.[name] !== undefined);
  const show = (id) => {
    for (const screen of all(".screen")) screen.hidden = screen.id !== id;
    if (id === "start") byId("rater").focus();
  };

  // Both files start together; one that ends first waits for the other, and both start again.
  let videos = [];
  const play = () => {
    for (const video of videos) video.play().catch(() => {});
  };
  const restart = () => {
    for (const video of videos) video.currentTime = 0;
    for (const image of all(".media img")) image.src = image.src;
    if (!isPaused) play();
  };
  const keepInStep = () => {
    if (videos.length === 2 && !isPaused) {
      const [first, second] = videos;
      if (!first.ended && !second.ended && !first.seeking && !second.seeking) {
        // Two frames of a clip at 30 frames a second.
        if (Math.abs(first.currentTime - second.currentTime) > 1 / 15) second.currentTime = first.currentTime;
      }
    }
    requestAnimationFrame(keepInStep);
  };
  requestAnimationFrame(keepInStep);

  const makeMedia = (file) => {
    const isVideo = !file.endsWith(".png");
    const element = document.createElement(isVideo ? "video" : "img");
    const ready = new Promise((resolve, reject) => {
      element.addEventListener(isVideo ? "canplaythrough" : "load", resolve, { once: true });
      element.addEventListener("error", () => reject(new Error(file)), { once: true });
    });
    if (isVideo) Object.assign(element, { muted: true, playsInline: true, preload: "auto", disablePictureInPicture: true });
    element.src = file;
    const ignore = () => {};
    ready.then(() => {
      const shortSide = Math.min(element.videoWidth ?? element.naturalWidth, element.videoHeight ?? element.naturalHeight);
      element.classList.toggle("tiny", shortSide <= 128);
    }).catch(ignore);
    return { element, ready, isVideo };
  };
  let preloaded = new Map();
  const take = (file) => preloaded.get(file) ?? makeMedia(file);
  const preload = (pair) => {
    preloaded = new Map(pair ? [pair.left, pair.right].map((side) => [side.file, makeMedia(side.file)]) : []);
  };

  const showPair = async (number) => {
    index = number;
    const pair = pairs[index], current = ++generation;
    state.index = index;
    save();
    show("vote");
    byId("failure").hidden = true;
    byId("prompt").textContent = pair.prompt || "(no text)";
    byId("prompt").classList.toggle("long", pair.prompt.length > 160);
    byId("rater-name").textContent = state.rater;
    active = Math.max(0, names.findIndex((name) => answersOf(pair)[name] === undefined));
    shownSince = null;
    const media = [take(pair.left.file), take(pair.right.file)];
    byId("left").replaceChildren(media[0].element);
    byId("right").replaceChildren(media[1].element);
    videos = [];
    update();
    try {
      await Promise.all(media.map((each) => each.ready));
    } catch {
      if (current !== generation) return;
      byId("failure").textContent = "A file of this pair is missing or damaged. Go on with the next pair.";
      byId("failure").hidden = false;
    }
    if (current !== generation) return;
    videos = media.filter((each) => each.isVideo).map((each) => each.element);
    for (const video of videos) {
      video.addEventListener("ended", () => {
        if (videos.includes(video) && videos.every((other) => other.ended)) restart();
      });
    }
    shownSince = byId("failure").hidden ? performance.now() : null;
    if (shownSince !== null) restart();
    preload(pairs[index + 1]);
    update();
  };

  const update = () => {
    const pair = pairs[index], answers = answersOf(pair), isReady = shownSince !== null;
    const done = pairs.filter(isComplete).length, isBroken = !byId("failure").hidden;
    byId("number").textContent = `${index + 1} of ${pairs.length}`;
    const progress = document.querySelector(".progress");
    progress.setAttribute("aria-valuemax", String(pairs.length));
    progress.setAttribute("aria-valuenow", String(done));
    progress.firstElementChild.style.width = `${(100 * done) / pairs.length}%`;
    for (const [number, question] of all(".question").entries()) {
      question.classList.toggle("active", number === active && isReady);
      for (const button of question.querySelectorAll("button")) {
        const side = button.dataset.choice === "tie" ? data.tie : pair[button.dataset.choice].name;
        button.setAttribute("aria-pressed", String(answers[names[number]] === side));
        button.disabled = !isReady;
      }
    }
    byId("back").disabled = index === 0;
    byId("next").disabled = !isComplete(pair) && !isBroken;
  };

  const addTime = () => {
    if (!Number.isFinite(shownSince)) return;
    const now = performance.now();
    answersOf(pairs[index]).seconds += (now - shownSince) / 1000;
    shownSince = now;
  };
  const answer = (number, choice) => {
    if (shownSince === null || number >= names.length) return;
    const pair = pairs[index], answers = answersOf(pair);
    answers[names[number]] = choice === "tie" ? data.tie : pair[choice].name;
    answers.time = new Date().toISOString();
    addTime();
    active = names.findIndex((name) => answers[name] === undefined);
    if (active < 0) active = names.length; // all answered: Enter goes on, arrow up changes an answer
    save();
    update();
  };
  const leave = (next) => {
    addTime();
    save();
    next();
  };
  const goNext = () => {
    if (byId("next").disabled) return;
    leave(() => (index + 1 < pairs.length ? showPair(index + 1) : end()));
  };
  const goBack = () => {
    if (index > 0) leave(() => showPair(index - 1));
  };
  const end = () => {
    const left = pairs.findIndex((pair) => !isComplete(pair)), done = pairs.filter(isComplete).length;
    generation++;
    videos = [];
    state.index = pairs.length;
    save();
    byId("left").replaceChildren();
    byId("right").replaceChildren();
    byId("end-text").textContent =
      left < 0
        ? `You answered all ${done} pairs. Save the file and send it back.`
        : `You answered ${done} of ${pairs.length} pairs. Save the file and send it back, or answer the others.`;
    byId("review").onclick = () => showPair(left < 0 ? pairs.length - 1 : left);
    show("end");
  };

  const download = () => {
    if (!byId("vote").hidden) addTime();
    save();
    const votes = pairs.filter(isComplete).map((pair) => {
      const { seconds, time, ...answers } = state.answers[pair.name];
      return { pair: pair.name, left: pair.left.name, ...answers, seconds: Math.round(seconds * 10) / 10, time };
    });
    const content = {
      format: data.format, page: data.page, rater: state.rater, started: state.started,
      exported: new Date().toISOString(), votes,
    };
    const url = URL.createObjectURL(new Blob([`${JSON.stringify(content, null, 2)}\n`], { type: "application/json" }));
    const slug = state.rater.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "") || "rater";
    const link = Object.assign(document.createElement("a"), { href: url, download: `votes-${slug}.json` });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  };

  const begin = (rater) => {
    const stored = JSON.parse(read(`${prefix}:${rater.toLowerCase()}`) ?? "null");
    state = stored ?? { rater, started: new Date().toISOString(), answers: {}, index: 0 };
    write(prefix, state.rater);
    pairs = order(state.rater.toLowerCase());
    if (state.index >= pairs.length) end();
    else showPair(state.index);
  };

  byId("start-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const rater = byId("rater").value.trim().replace(/\s+/g, " ");
    if (rater) begin(rater);
  });
  for (const [number, question] of all(".question").entries()) {
    for (const button of question.querySelectorAll("button")) {
      button.addEventListener("click", () => answer(number, button.dataset.choice));
    }
  }
  // After a click of the mouse, Enter goes on and Space pauses rather than pressing the button again.
  byId("vote").addEventListener("click", (event) => {
    if (event.detail > 0) document.activeElement.blur();
  });
  const togglePause = () => {
    isPaused = !isPaused;
    byId("pause").setAttribute("aria-pressed", String(isPaused));
    byId("pause").firstChild.textContent = isPaused ? "Play " : "Pause ";
    if (isPaused) for (const video of videos) video.pause();
    else play();
  };
  byId("pause").addEventListener("click", togglePause);
  byId("replay").addEventListener("click", restart);
  byId("next").addEventListener("click", goNext);
  byId("back").addEventListener("click", goBack);
  byId("other").addEventListener("click", () => {
    write(prefix, "");
    byId("rater").value = "";
    show("start");
  });
  for (const button of all(".export")) button.addEventListener("click", download);

  const keys = {
    ArrowLeft: () => answer(active, "left"),
    ArrowDown: () => answer(active, "tie"),
    ArrowRight: () => answer(active, "right"),
    ArrowUp: () => {
      active = Math.max(0, active - 1);
      update();
    },
    Enter: goNext,
    Backspace: goBack,
    " ": togglePause,
    r: restart,
    R: restart,
  };
  addEventListener("keydown", (event) => {
    const hasModifier = event.ctrlKey || event.metaKey || event.altKey;
    // Enter and Space press the button that has the focus.
    const isPress = (event.key === "Enter" || event.key === " ") && event.target.closest?.("button");
    if (byId("vote").hidden || hasModifier || event.repeat || isPress || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  addEventListener("visibilitychange", () => {
    // Time in which the page was not looked at does not count, but answers and their time are stored.
    if (!state || byId("vote").hidden) return;
    if (document.hidden) {
      addTime();
      shownSince = shownSince === null ? null : Infinity;
      save();
    } else if (shownSince === Infinity) shownSince = performance.now();
  });

  show("start");
  const last = read(prefix);
  if (last) begin(last);
})();
