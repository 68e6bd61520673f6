// ---- the stage: one clip large, a swipe between two of its panels or their difference; all players keep step
const transport = document.querySelector(".transport");
if (transport) {
  const part = (id) => document.getElementById(id);
  const [stage, canvas, play, seek, clock, rate, loop, back, ahead] = ["stage", "canvas", "play", "seek", "clock", "rate", "loop", "back", "ahead"].map(part);
  const [chooser, mode, left, right, every] = ["clip", "mode", "left", "right", "every"].map(part);
  const [leftTag, rightTag, divider] = [".left", ".right", ".divider"].map((name) => stage.querySelector(name));
  const frames = Number(transport.dataset.frames) || 0;
  const [caption, gap, gain] = ["caption", "gap", "gain"].map((name) => Number(stage.dataset[name]));
  const picture = canvas.getContext("2d");
  const clips = [...document.querySelectorAll(".player")].map((figure) => ({
    videos: [...figure.querySelectorAll("video")],
    panels: JSON.parse(figure.dataset.panels),
    name: figure.dataset.clip,
  }));
  let clip = clips[0];
  let share = 0.5; // of the stage that lies left of the divider
  let playing = false;

  for (const video of clips.flatMap((one) => one.videos)) {
    if (!video.dataset.src) continue;
    // Some browsers do not seek in data URIs: hand them the same bytes as a file.
    const bytes = Uint8Array.from(atob(video.dataset.src.split(",")[1]), (letter) => letter.charCodeAt(0));
    video.src = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
    delete video.dataset.src;
  }
  // Videos that nobody sees need not run: those of the stage do, and all of them where all are shown.
  const active = () => (every.open ? clips.flatMap((one) => one.videos) : clip.videos);
  const leader = () => clip.videos.reduce((best, video) => ((video.duration || 0) > (best.duration || 0) ? video : best));
  const frameTime = () => (frames && leader().duration ? leader().duration / frames : 1 / 15);
  const frameNow = () => Math.max(0, Math.min(frames ? frames - 1 : Infinity, Math.floor(leader().currentTime / frameTime() + 1e-3)));

  // -- where a panel lies within its video: captions above, gaps between
  function region(panel) {
    const video = clip.videos[panel.video];
    const width = Math.floor((video.videoWidth - gap * (panel.columns - 1)) / panel.columns);
    return { video, x: panel.column * (width + gap), y: caption, width, height: video.videoHeight - caption };
  }
  function put(panel, from, to, size) {
    const { video, x, y, width, height } = region(panel);
    picture.drawImage(video, x + from * width, y, (to - from) * width, height, from * size.width, 0, (to - from) * size.width, size.height);
  }
  function stacked() {
    const [widths, heights] = ["videoWidth", "videoHeight"].map((side) => clip.videos.map((video) => video[side]));
    return { width: Math.max(...widths), height: heights.reduce((sum, height) => sum + height, 0) };
  }
  function resize(width, height) {
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    stage.style.maxWidth = `calc(72vh * ${width / height})`;
  }
  function paint() {
    if (clip.videos.some((video) => video.readyState < 2)) return;
    const [first, second] = [clip.panels[left.value], clip.panels[right.value]];
    const whole = mode.value === "all";
    const size = whole ? stacked() : region(first);
    resize(size.width, size.height);
    picture.imageSmoothingEnabled = false;
    picture.globalCompositeOperation = "copy";
    if (whole) {
      let top = 0;
      picture.clearRect(0, 0, size.width, size.height);
      picture.globalCompositeOperation = "source-over";
      for (const video of clip.videos) {
        picture.drawImage(video, 0, top);
        top += video.videoHeight;
      }
    } else if (mode.value === "difference") {
      put(first, 0, 1, size);
      picture.globalCompositeOperation = "difference"; // |left − right| of every channel
      put(second, 0, 1, size);
      picture.globalCompositeOperation = "lighter"; // added to itself, it doubles
      for (let times = 1; times < gain; times *= 2) picture.drawImage(canvas, 0, 0);
    } else {
      put(first, 0, 1, size);
      picture.globalCompositeOperation = "source-over";
      if (share < 1) put(second, share, 1, size);
    }
    tag(leftTag, mode.value === "difference" ? null : first);
    tag(rightTag, second);
    if (mode.value === "difference") rightTag.textContent = `|${first.label} − ${second.label}| × ${gain}`;
  }
  function tag(node, panel) {
    node.hidden = mode.value === "all" || !panel;
    if (!panel) return;
    const score = panel.psnr[frameNow()];
    node.textContent = panel.label + (score === undefined || score === null ? "" : `  ${score.toFixed(1)} dB`);
  }
  function split(to) {
    share = Math.max(0, Math.min(1, to));
    divider.style.left = 100 * share + "%";
    stage.setAttribute("aria-valuenow", Math.round(100 * share));
    paint();
  }
  function changeMode() {
    const swipes = mode.value === "swipe";
    divider.hidden = !swipes;
    stage.classList.toggle("swipes", swipes);
    for (const choice of [left, right]) choice.disabled = mode.value === "all";
    paint();
  }
  function fill(choice, chosen) {
    choice.replaceChildren(...clip.panels.map((panel, index) => new Option(panel.label, index, false, index === chosen)));
  }
  function show(index) {
    const time = leader().currentTime;
    const [first, second] = [left.selectedIndex, right.selectedIndex];
    clip = clips[index];
    const last = clip.panels.length - 1;
    fill(left, first < 0 || first > last ? Math.max(0, last - 1) : first);
    fill(right, second < 0 || second > last ? last : second);
    for (const line of document.querySelectorAll("path[data-clip]")) line.classList.toggle("picked", line.dataset.clip === clip.name);
    for (const video of clip.videos) video.preload = "auto";
    if (playing) start();
    else goTo(Math.floor(time / frameTime() + 1e-3));
    paint();
  }

  // -- time: the longest video of the stage leads, the others follow its clock
  const frameCharts = charts.filter((chart) => chart.data.frames);
  for (const chart of frameCharts) {
    chart.playhead = svgNode("line", { class: "playhead", y1: chart.data.top, y2: chart.data.bottom, visibility: "hidden" });
    chart.svg.append(chart.playhead);
    chart.svg.addEventListener("click", (event) => { pause(); goTo(chart.nearest(event)); });
  }
  function align(time, tolerance) {
    for (const video of active()) {
      const wanted = Math.min(time, Math.max(0, (video.duration || 0) - 1e-3));
      if (Math.abs(video.currentTime - wanted) > tolerance) video.currentTime = wanted;
    }
  }
  function draw() {
    const frame = frameNow();
    clock.textContent = "frame " + frame + (frames ? " / " + (frames - 1) : "");
    if (document.activeElement !== seek || playing) seek.value = String(Math.round((1000 * leader().currentTime) / (leader().duration || 1)));
    for (const chart of frameCharts) {
      const x = chart.data.x[frame];
      chart.playhead.setAttribute("visibility", x === undefined ? "hidden" : "visible");
      if (x === undefined) continue;
      chart.playhead.setAttribute("x1", x);
      chart.playhead.setAttribute("x2", x);
    }
    paint();
  }
  function goTo(frame) {
    align(Math.max(0, frame + 0.5) * frameTime(), 0); // the middle of a frame: no rounding can show its neighbour
  }
  function halt() {
    playing = false;
    for (const video of clips.flatMap((one) => one.videos)) video.pause();
    play.textContent = "▶ Play";
  }
  function pause() {
    halt();
    if (leader().duration) goTo(frameNow());
  }
  async function start() {
    halt();
    playing = true;
    play.textContent = "❚❚ Pause";
    align(leader().ended ? 0 : leader().currentTime, 1e-3);
    for (const video of active()) video.playbackRate = Number(rate.value);
    await Promise.all(active().map((video) => video.play().catch((error) => { if (error.name !== "AbortError") clock.textContent = String(error.message); })));
    if (playing) requestAnimationFrame(follow);
  }
  let followed = 0;
  function follow(now) {
    if (!playing || now === followed) return; // one loop, however often it was started
    followed = now;
    if (leader().ended) {
      if (loop.checked) start();
      else pause();
      return;
    }
    align(leader().currentTime, 0.09);
    draw();
    requestAnimationFrame(follow);
  }
  play.addEventListener("click", () => (playing ? pause() : start()));
  seek.addEventListener("input", () => { pause(); align((seek.value / 1000) * leader().duration, 0); });
  rate.addEventListener("change", () => active().forEach((video) => { video.playbackRate = Number(rate.value); }));
  back.addEventListener("click", () => { pause(); goTo(Math.max(0, frameNow() - 1)); });
  ahead.addEventListener("click", () => { pause(); goTo(Math.min((frames || Infinity) - 1, frameNow() + 1)); });
  every.addEventListener("toggle", () => (playing ? start() : align(leader().currentTime, 1e-3)));
  chooser.addEventListener("change", () => show(chooser.selectedIndex));
  mode.addEventListener("change", changeMode);
  for (const choice of [left, right]) choice.addEventListener("change", paint);
  const drag = (event) => {
    const box = stage.getBoundingClientRect();
    if (mode.value === "swipe") split((event.clientX - box.left) / box.width);
  };
  stage.addEventListener("pointerdown", (event) => { stage.setPointerCapture(event.pointerId); drag(event); });
  stage.addEventListener("pointermove", (event) => { if (stage.hasPointerCapture(event.pointerId)) drag(event); });
  stage.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
    if (step && mode.value === "swipe") split(share + step);
    else if (event.key === " ") play.click();
    else return;
    event.preventDefault();
  });
  clips.forEach((one, index) => one.videos.forEach((video) => {
    video.addEventListener("click", () => { chooser.selectedIndex = index; show(index); stage.scrollIntoView({ block: "nearest" }); });
    video.addEventListener("seeked", draw);
    video.addEventListener("loadeddata", draw);
  }));
  show(0);
  split(0.5);
  changeMode();
}
