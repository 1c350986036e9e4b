// The job that is looked at: its previews and progress, and then its videos.
import { deleteJob, getPreviewAddress } from "./api.js";
import { announce, byId, formatSeconds, formatSize, make, makeButton } from "./dom.js";
import { fitInto, makePlayer } from "./player.js";

export const isActive = (job) => ["waiting", "preparing", "sampling", "decoding"].includes(job.status);

/** Return a sentence on the state of a job. */
export function describeJob(job) {
  switch (job.status) {
    case "waiting":
      return job.ahead ? `Waiting: ${job.ahead} before yours` : "Waiting: yours is next";
    case "preparing":
      return "Preparing the model: the first clip of a size takes longer";
    case "sampling": {
      const left = job.seconds_left === null ? "" : ` · ${formatSeconds(job.seconds_left)} left`;
      return job.steps ? `Step ${job.step} of ${job.steps}${left}` : "Sampling";
    }
    case "decoding":
      return "Writing the clip";
    case "failed":
      return "Failed";
    case "cancelled":
      return "Cancelled";
    default:
      return "Done";
  }
}

/** Return a bar of the progress of a job, and a function that updates it. */
export function makeProgress(title) {
  const bar = make("progress", { max: 1, "aria-label": `Progress of ${title}` });
  const update = (job) => {
    if (job.status === "waiting" || job.status === "preparing") bar.removeAttribute("value");
    else bar.value = job.status === "decoding" ? 1 : job.step / (job.steps || 1);
  };
  return { bar, update };
}

/** Return paragraphs with what the server noticed about a clip, such as a prompt that was cut. */
const makeNotes = (item) => (item.notes ?? []).map((text) => make("p", { class: "task-note", textContent: text }));

const QUIET = 5000; // milliseconds between announcements of progress

export class Stage {
  /** `actions` makes the buttons of an item; `getItems` returns the loaded items by id. */
  constructor({ actions, getItems, showItem }) {
    Object.assign(this, { actions, getItems, showItem });
    this.root = byId("stage");
    this.body = make("div", { class: "stage-body" });
    this.root.append(this.body);
    this.job = null;
    this.mine = null; // jobs that may come into view by themselves, until they were seen finished
    this.shown = "";
  }

  /** Look at a job of this user; it comes into view with the next state. */
  follow(id) {
    this.wanted = id;
    this.mine?.add(id);
  }

  /** Look at a job that this page started, unless another one is running. */
  add(id) {
    this.mine?.add(id);
    const isBusy = this.wanted || (this.job && isActive(this.job));
    if (isBusy) announce("Queued");
    else this.follow(id);
  }

  update(state) {
    const jobs = new Map(state.jobs.map((job) => [job.id, job]));
    this.mine ??= new Set(state.jobs.filter(isActive).map((job) => job.id));
    const previous = this.job;
    if (jobs.has(this.wanted)) {
      this.job = jobs.get(this.wanted);
      this.wanted = null;
    } else {
      this.job = jobs.get(this.job?.id) ?? (this.shown.startsWith("items") ? this.job : null);
      const isFree = !this.job || (!isActive(this.job) && this.job.status !== "failed");
      if (isFree && !this.body.contains(document.activeElement)) this.job = this.findNext(state.jobs) ?? this.job;
    }
    if (this.job && !isActive(this.job)) this.mine.delete(this.job.id);
    this.say(previous);
    this.draw();
  }

  /** Return the job that comes into view after the present one: a later one may be done before it was seen to run. */
  findNext(jobs) {
    const isMine = (job) => this.mine.has(job.id);
    const active = jobs.filter((job) => isMine(job) && isActive(job)).sort((a, b) => a.ahead - b.ahead);
    const later = jobs.slice(jobs.findIndex((job) => job.id === this.job?.id) + 1);
    return active[0] ?? later.findLast((job) => isMine(job) && job.status === "done");
  }

  /** Say changes, and progress now and then. */
  say(previous) {
    const { job } = this;
    if (!job) return;
    const isNew = previous?.id !== job.id;
    if (isNew) this.isPreviewSaid = false;
    const now = performance.now();
    if (isNew || previous.status !== job.status) {
      if (job.status === "done") announce(`Done: ${job.title}`);
      else if (job.status === "failed") announce(`Failed: ${job.error}`);
      else announce(job.status === "sampling" ? "Sampling" : describeJob(job));
      this.last = now;
    } else if (job.status === "waiting" ? previous.ahead !== job.ahead : now - this.last > QUIET && previous.step !== job.step) {
      announce(describeJob(job) + (job.preview && !this.isPreviewSaid ? ". A preview is shown" : ""));
      this.isPreviewSaid = Boolean(job.preview);
      this.last = now;
    }
  }

  draw() {
    const { job } = this;
    if (!job) return this.drawLatest();
    if (job.status !== "done") return this.drawJob(job);
    const items = job.items.map((id) => this.getItems().get(id)).filter(Boolean);
    if (items.length) this.drawItems(items);
    else if (!this.shown.startsWith(`job ${job.id}`)) this.drawText("Done", "The clip is no longer in the gallery.");
  }

  /** Show the newest item of the gallery, or how to begin. */
  drawLatest() {
    const newest = this.getItems().values().next().value;
    if (newest) this.drawItems([newest]);
    else this.drawText("Nothing here yet", "Describe a clip and press Generate: it is sampled before your eyes, and plays here.");
  }

  replace(key, ...children) {
    const hadFocus = this.body.contains(document.activeElement);
    this.shown = key;
    this.body.replaceChildren(...children);
    if (hadFocus) this.root.focus({ preventScroll: true });
  }

  drawText(heading, text) {
    const key = `text ${heading}`;
    if (this.shown === key) return;
    const placeholder = make("div", { class: "placeholder" }, make("p", { class: "big", textContent: heading }), make("p", { textContent: text }));
    this.replace(key, make("div", { class: "stage-screen" }, placeholder));
  }

  drawJob(job) {
    const key = `job ${job.id}`;
    if (this.shown !== key) this.buildJob(job, key);
    const { parts } = this;
    this.root.setAttribute("aria-busy", String(isActive(job)));
    parts.state.textContent = describeJob(job);
    parts.progress.update(job);
    parts.progress.bar.hidden = !isActive(job);
    if (!isActive(job) && parts.stop === document.activeElement) this.root.focus({ preventScroll: true });
    parts.stop.hidden = !isActive(job);
    parts.remove.hidden = isActive(job);
    parts.error.hidden = job.status !== "failed";
    parts.error.textContent = job.error ?? "";
    parts.screen.classList.toggle("waiting", isActive(job) && !parts.isPreviewed);
    if (job.preview && job.preview !== parts.preview && isActive(job)) this.loadPreview(job);
  }

  buildJob(job, key) {
    const progress = makeProgress(job.title);
    const parts = {
      progress,
      preview: 0,
      screen: make("div", { class: "stage-screen" }),
      state: make("p", { class: "state" }),
      error: make("p", { class: "warning", hidden: true }),
      stop: makeButton("Cancel", () => this.cancel(job)),
      remove: makeButton("Remove", () => this.cancel(job), { hidden: true }),
    };
    this.parts = parts;
    const text = make("div", { class: "stage-text" }, make("p", { class: "prompt", textContent: job.title }), parts.state);
    this.replace(key, parts.screen, progress.bar, make("div", { class: "stage-foot" }, text, make("div", { class: "actions" }, parts.stop, parts.remove)), parts.error);
  }

  /** Load a preview, and replace the former one when it can be drawn. */
  loadPreview(job) {
    const { parts } = this;
    parts.preview = job.preview;
    const image = make("img", { alt: "Preview of the clip while it is sampled", src: getPreviewAddress(job) });
    const show = () => {
      if (!parts.screen.isConnected || parts.preview !== job.preview) return;
      parts.isPreviewed = true;
      parts.screen.classList.remove("waiting");
      parts.screen.replaceChildren(image, make("span", { class: "badge", textContent: "Preview" }));
      fitInto(parts.screen, image, image.naturalWidth, image.naturalHeight);
    };
    image.decode().then(show, () => {});
  }

  async cancel(job) {
    try {
      await deleteJob(job.id);
    } catch (error) {
      if (error.status !== 404 && this.parts) {
        this.parts.error.textContent = error.message;
        this.parts.error.hidden = false;
      }
    }
  }

  drawItems(items) {
    const key = `items ${items.map((item) => item.id).join(" ")}`;
    if (this.shown === key) return;
    this.root.removeAttribute("aria-busy");
    if (items.length === 1) {
      const [item] = items;
      const screen = makePlayer(item, item.title || item.tab_title);
      screen.className = "stage-screen";
      const text = make(
        "div",
        { class: "stage-text" },
        make("p", { class: "prompt", textContent: item.title || item.tab_title }),
        make("p", { class: "state", textContent: `${item.tab_title} · ${formatSize(item)} · seed ${item.seed}` }),
      );
      const details = makeButton("Details", () => this.showItem(item));
      const foot = make("div", { class: "stage-foot" }, text, make("div", { class: "actions" }, ...this.actions(item), details));
      this.replace(key, screen, foot, ...makeNotes(item));
      return;
    }
    const cells = items.map((item) => {
      const details = makeButton(`Seed ${item.seed}`, () => this.showItem(item), { "aria-label": `Seed ${item.seed}: details` });
      return make("div", { class: "cell" }, makePlayer(item, `${item.title}, seed ${item.seed}`), details);
    });
    const [{ title, tab_title: task }] = items;
    const about = make("p", { class: "state", textContent: `${task} · ${formatSize(items[0])}` });
    const text = make("div", { class: "stage-text" }, make("p", { class: "prompt", textContent: title || task }), about);
    const foot = make("div", { class: "stage-foot" }, text);
    this.replace(key, make("div", { class: "stage-screen several" }, ...cells), foot, ...makeNotes(items[0]));
  }
}
