// The list of this user's other jobs.
import { deleteJob } from "./api.js";
import { announce, byId, make, makeButton, plural } from "./dom.js";
import { describeJob, isActive, makeProgress } from "./stage.js";

export class Queue {
  /** `show` puts a job on the stage. */
  constructor(show) {
    this.root = byId("queue");
    this.show = show;
    this.count = make("span", { class: "count" });
    byId("queue-title").append(this.count);
    this.list = make("ul", { class: "jobs" });
    this.root.append(this.list);
    this.rows = new Map();
  }

  /** Show the jobs that are not on the stage; those that are done are in the gallery. */
  update(state, current) {
    const jobs = state.jobs.filter((job) => job.id !== current?.id && (isActive(job) || job.status === "failed"));
    const ids = new Set(jobs.map((job) => job.id));
    for (const [id, row] of this.rows) {
      if (ids.has(id)) continue;
      if (row.element.contains(document.activeElement)) byId("stage").focus({ preventScroll: true });
      row.element.remove();
      this.rows.delete(id);
    }
    for (const job of jobs) {
      if (!this.rows.has(job.id)) this.addRow(job);
      const row = this.rows.get(job.id);
      row.state.textContent = job.status === "failed" ? `Failed: ${job.error}` : describeJob(job);
      row.element.classList.toggle("failed", job.status === "failed");
      row.progress.bar.hidden = job.status !== "sampling" && job.status !== "decoding";
      row.progress.update(job);
      row.stop.textContent = isActive(job) ? "Cancel" : "Remove";
      row.stop.setAttribute("aria-label", `${row.stop.textContent}: ${job.title}`);
    }
    this.root.hidden = !jobs.length;
    this.count.textContent = state.waiting ? `${plural(state.waiting, "job")} of all users waiting` : "";
  }

  addRow(job) {
    const progress = makeProgress(job.title);
    const state = make("p", { class: "state" });
    const stop = makeButton("Cancel", () => this.stop(job, state));
    const show = makeButton("Show", () => this.show(job.id), { "aria-label": `Show: ${job.title}` });
    const text = make("div", { class: "stage-text" }, make("p", { class: "prompt", textContent: job.title }), state);
    const element = make("li", {}, text, progress.bar, make("div", { class: "actions" }, show, stop));
    this.rows.set(job.id, { element, state, progress, stop });
    this.list.append(element);
  }

  async stop(job, state) {
    try {
      await deleteJob(job.id);
      announce("Cancelled");
    } catch (error) {
      state.textContent = error.message;
    }
  }
}
