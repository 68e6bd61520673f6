// ---- the player: one clip large, a swipe between two of its panels or their difference; all videos keep step
const byId = (id) => document.getElementById(id);

// Every clip of the page: its videos, its panels (which video, which column of it, label, scores) and its name.
function readClips() {
  const clips = [...document.querySelectorAll(".player")].map((figure) => ({
    videos: [...figure.querySelectorAll("video")],
    panels: JSON.parse(figure.dataset.panels),
    name: figure.dataset.clip,
  }));
  for (const video of clips.flatMap((clip) => clip.videos)) {
    if (!video.dataset.src) continue;
    // Some browsers do not seek in data URIs: hand them the same bytes as a file.
    const bytes = Uint8Array.from(atob(video.dataset.src.split(",")[1]), (letter) => letter.charCodeAt(0));
    video.src = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
    delete video.dataset.src;
  }
  return clips;
}

// The large picture: two panels of a clip on either side of a divider, their difference, or all of them.
class Stage {
  constructor(node) {
    this.node = node;
    this.canvas = byId("canvas");
    this.picture = this.canvas.getContext("2d");
    [this.mode, this.left, this.right] = ["mode", "left", "right"].map(byId);
    [this.leftTag, this.rightTag, this.divider] = [".left", ".right", ".divider"].map((name) => node.querySelector(name));
    [this.caption, this.gap, this.gain] = ["caption", "gap", "gain"].map((name) => Number(node.dataset[name]));
    this.share = 0.5; // of the picture that lies left of the divider
  }

  // Put a clip on it, with the same choice of panels as before where it has them.
  show(clip) {
    const [first, second] = [this.left.selectedIndex, this.right.selectedIndex];
    const last = clip.panels.length - 1;
    const fill = (choice, chosen) =>
      choice.replaceChildren(...clip.panels.map((panel, index) => new Option(panel.label, index, false, index === chosen)));
    this.clip = clip;
    fill(this.left, first < 0 || first > last ? Math.max(0, last - 1) : first);
    fill(this.right, second < 0 || second > last ? last : second);
    this.changeMode();
  }

  // Where a panel lies within its video: captions above, gaps between.
  region(panel) {
    const video = this.clip.videos[panel.video];
    const width = Math.floor((video.videoWidth - this.gap * (panel.columns - 1)) / panel.columns);
    return { video, x: panel.column * (width + this.gap), y: this.caption, width, height: video.videoHeight - this.caption };
  }

  put(panel, from, size) {
    const { video, x, y, width, height } = this.region(panel);
    const kept = 1 - from;
    this.picture.drawImage(video, x + from * width, y, kept * width, height, from * size.width, 0, kept * size.width, size.height);
  }

  resize({ width, height }) {
    if (this.canvas.width !== width || this.canvas.height !== height) [this.canvas.width, this.canvas.height] = [width, height];
    this.node.style.maxWidth = `calc(72vh * ${width / height})`;
  }

  paint(frame) {
    if (this.clip.videos.some((video) => video.readyState < 2)) return;
    this.picture.imageSmoothingEnabled = false;
    const [first, second] = [this.clip.panels[this.left.value], this.clip.panels[this.right.value]];
    if (this.mode.value === "all") this.paintAll();
    else if (this.mode.value === "difference") this.paintDifference(first, second);
    else this.paintSwipe(first, second);
    this.label(frame, first, second);
  }

  paintAll() {
    const [widths, heights] = ["videoWidth", "videoHeight"].map((side) => this.clip.videos.map((video) => video[side]));
    const size = { width: Math.max(...widths), height: heights.reduce((sum, height) => sum + height, 0) };
    this.resize(size);
    this.picture.clearRect(0, 0, size.width, size.height);
    this.picture.globalCompositeOperation = "source-over";
    let top = 0;
    for (const video of this.clip.videos) {
      this.picture.drawImage(video, 0, top);
      top += video.videoHeight;
    }
  }

  paintDifference(first, second) {
    const size = this.region(first);
    this.resize(size);
    this.picture.globalCompositeOperation = "copy";
    this.put(first, 0, size);
    this.picture.globalCompositeOperation = "difference"; // |left − right| of every channel
    this.put(second, 0, size);
    this.picture.globalCompositeOperation = "lighter"; // added to itself, it doubles
    for (let times = 1; times < this.gain; times *= 2) this.picture.drawImage(this.canvas, 0, 0);
  }

  paintSwipe(first, second) {
    const size = this.region(first);
    this.resize(size);
    this.picture.globalCompositeOperation = "copy";
    this.put(first, 0, size);
    this.picture.globalCompositeOperation = "source-over";
    if (this.share < 1) this.put(second, this.share, size);
  }

  label(frame, first, second) {
    const tell = (node, panel) => {
      node.hidden = this.mode.value === "all" || !panel;
      if (node.hidden) return;
      const score = panel.psnr[frame];
      node.textContent = panel.label + (score === undefined || score === null ? "" : `  ${score.toFixed(1)} dB`);
    };
    const difference = this.mode.value === "difference";
    tell(this.leftTag, difference ? null : first);
    tell(this.rightTag, this.clip.panels.length > 1 ? second : null); // a lone panel is told once
    if (difference) this.rightTag.textContent = `|${first.label} − ${second.label}| × ${this.gain}`;
  }

  split(to) {
    this.share = Math.max(0, Math.min(1, to));
    this.divider.style.left = 100 * this.share + "%";
    this.node.setAttribute("aria-valuenow", Math.round(100 * this.share));
  }

  swipes() {
    return this.mode.value === "swipe" && this.clip.panels.length > 1;
  }

  changeMode() {
    const swipes = this.swipes();
    this.divider.hidden = !swipes;
    this.node.classList.toggle("swipes", swipes);
    for (const choice of [this.left, this.right]) choice.disabled = this.mode.value === "all";
  }
}

// Time: the longest video of the shown clip leads, the others follow its clock.
class Playback {
  constructor(clips, frames, drawn) {
    [this.play, this.seek, this.clock, this.rate, this.loop, this.every] = ["play", "seek", "clock", "rate", "loop", "every"].map(byId);
    Object.assign(this, { clips, frames, drawn, clip: clips[0], playing: false, followed: 0 });
    this.follow = this.follow.bind(this);
  }

  // Videos that nobody sees need not run: those of the stage do, and all of them where all are shown.
  active() {
    return this.every.open ? this.clips.flatMap((clip) => clip.videos) : this.clip.videos;
  }
  leader() {
    return this.clip.videos.reduce((best, video) => ((video.duration || 0) > (best.duration || 0) ? video : best));
  }
  frameTime() {
    return this.frames && this.leader().duration ? this.leader().duration / this.frames : 1 / 15;
  }
  frame() {
    const last = this.frames ? this.frames - 1 : Infinity;
    return Math.max(0, Math.min(last, Math.floor(this.leader().currentTime / this.frameTime() + 1e-3)));
  }

  show(clip) {
    const time = this.leader().currentTime;
    this.clip = clip;
    for (const video of clip.videos) video.preload = "auto";
    if (this.playing) this.start();
    else this.goTo(Math.floor(time / this.frameTime() + 1e-3));
  }

  align(time, tolerance) {
    for (const video of this.active()) {
      const wanted = Math.min(time, Math.max(0, (video.duration || 0) - 1e-3));
      if (Math.abs(video.currentTime - wanted) > tolerance) video.currentTime = wanted;
    }
  }
  goTo(frame) {
    this.align(Math.max(0, frame + 0.5) * this.frameTime(), 0); // the middle of a frame: no rounding can show its neighbour
  }
  step(frames) {
    this.pause();
    this.goTo(Math.max(0, Math.min((this.frames || Infinity) - 1, this.frame() + frames)));
  }
  halt() {
    this.playing = false;
    for (const video of this.clips.flatMap((clip) => clip.videos)) video.pause();
    this.play.textContent = "▶ Play";
  }
  pause() {
    this.halt();
    if (this.leader().duration) this.goTo(this.frame());
  }
  async start() {
    this.halt();
    this.playing = true;
    this.play.textContent = "❚❚ Pause";
    this.align(this.leader().ended ? 0 : this.leader().currentTime, 1e-3);
    for (const video of this.active()) video.playbackRate = Number(this.rate.value);
    const told = (error) => { if (error.name !== "AbortError") this.clock.textContent = String(error.message); };
    await Promise.all(this.active().map((video) => video.play().catch(told)));
    if (this.playing) requestAnimationFrame(this.follow);
  }
  follow(now) {
    if (!this.playing || now === this.followed) return; // one loop, however often it was started
    this.followed = now;
    if (this.leader().ended) {
      if (this.loop.checked) this.start();
      else this.pause();
      return;
    }
    this.align(this.leader().currentTime, 0.09);
    this.tell();
    requestAnimationFrame(this.follow);
  }

  // Show where time stands, on the transport and in whatever else is drawn.
  tell() {
    const frame = this.frame();
    this.clock.textContent = "frame " + frame + (this.frames ? " / " + (this.frames - 1) : "");
    const { currentTime, duration } = this.leader();
    if (document.activeElement !== this.seek || this.playing) this.seek.value = String(Math.round((1000 * currentTime) / (duration || 1)));
    this.drawn(frame);
  }

  listen() {
    this.play.addEventListener("click", () => (this.playing ? this.pause() : this.start()));
    this.seek.addEventListener("input", () => { this.pause(); this.align((this.seek.value / 1000) * this.leader().duration, 0); });
    this.rate.addEventListener("change", () => this.active().forEach((video) => { video.playbackRate = Number(this.rate.value); }));
    byId("back").addEventListener("click", () => this.step(-1));
    byId("ahead").addEventListener("click", () => this.step(1));
    this.every.addEventListener("toggle", () => (this.playing ? this.start() : this.align(this.leader().currentTime, 1e-3)));
    for (const video of this.clips.flatMap((clip) => clip.videos))
      for (const event of ["seeked", "loadeddata"]) video.addEventListener(event, () => this.tell());
  }
}

// A line in every chart over frames that goes with the videos; a click on a chart takes them there.
function playheads(playback) {
  const shown = charts.filter((chart) => chart.data.frames);
  for (const chart of shown) {
    chart.playhead = svgNode("line", { class: "playhead", y1: chart.data.top, y2: chart.data.bottom, visibility: "hidden" });
    chart.svg.append(chart.playhead);
    chart.svg.addEventListener("click", (event) => { playback().pause(); playback().goTo(chart.nearest(event)); });
  }
  return (frame) => {
    for (const chart of shown) {
      const x = chart.data.x[frame];
      chart.playhead.setAttribute("visibility", x === undefined ? "hidden" : "visible");
      for (const end of x === undefined ? [] : ["x1", "x2"]) chart.playhead.setAttribute(end, x);
    }
  };
}

// The divider follows a pointer that drags over the picture, and the arrow keys.
function swipe(stage, playback) {
  const moved = (to) => { stage.split(to); stage.paint(playback.frame()); };
  const drag = (event) => {
    const box = stage.node.getBoundingClientRect();
    if (stage.swipes()) moved((event.clientX - box.left) / box.width);
  };
  stage.node.addEventListener("pointerdown", (event) => { stage.node.setPointerCapture(event.pointerId); drag(event); });
  stage.node.addEventListener("pointermove", (event) => { if (stage.node.hasPointerCapture(event.pointerId)) drag(event); });
  stage.node.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
    if (step && stage.swipes()) moved(stage.share + step);
    else if (event.key === " ") playback.play.click();
    else return;
    event.preventDefault();
  });
}

function startPlayer(transport) {
  const clips = readClips();
  const stage = new Stage(byId("stage"));
  const chooser = byId("clip");
  let playback = null;
  const movePlayheads = playheads(() => playback);
  playback = new Playback(clips, Number(transport.dataset.frames) || 0, (frame) => { movePlayheads(frame); stage.paint(frame); });
  const paint = () => stage.paint(playback.frame());
  const show = (index) => {
    stage.show(clips[index]);
    for (const line of document.querySelectorAll("path[data-clip]")) line.classList.toggle("picked", line.dataset.clip === clips[index].name);
    playback.show(clips[index]);
    paint();
  };
  chooser.addEventListener("change", () => show(chooser.selectedIndex));
  stage.mode.addEventListener("change", () => { stage.changeMode(); paint(); });
  for (const choice of [stage.left, stage.right]) choice.addEventListener("change", paint);
  clips.forEach((clip, index) => clip.videos.forEach((video) =>
    video.addEventListener("click", () => { chooser.selectedIndex = index; show(index); stage.node.scrollIntoView({ block: "nearest" }); })));
  playback.listen();
  swipe(stage, playback);
  stage.split(0.5);
  show(0);
}

const transport = document.querySelector(".transport");
if (transport) startPlayer(transport);
