// The studio page: the form on one side; the stage, the queue and the gallery on the other.
import { getModel, postJob, watchState } from "./api.js";
import { announce, byId, make, makeButton, openDialog } from "./dom.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { Queue } from "./queue.js";
import { isActive, Stage } from "./stage.js";

const LOST = "The connection to the server is lost; trying again. What runs there goes on.";

function showConnection(isConnected, text) {
  const banner = byId("connection");
  if (banner.hidden === isConnected && (isConnected || banner.textContent === (text || LOST))) return;
  banner.hidden = isConnected;
  banner.textContent = isConnected ? "" : text || LOST;
  if (isConnected) announce("Connected again");
}

/** Ask where an item is used, and put it there. */
function chooseUse(model, form, item) {
  const isAccepted = (field) => field.kind === "image" || (field.kind === "clip" && item.frames > 1);
  const uses = model.tabs.flatMap((tab) => tab.fields.filter(isAccepted).map((field) => ({ tab, field })));
  const buttons = uses.map(({ tab, field }) => {
    const use = () => {
      dialog.close();
      form.useItem(tab.name, field.name, item);
    };
    return make("li", {}, make("button", { type: "button", on: { click: use } }, make("b", { textContent: tab.title }), make("span", { class: "muted", textContent: field.title })));
  });
  const content = uses.length ? make("ul", { class: "uses" }, ...buttons) : make("p", { textContent: "This model has no task that takes a clip or a picture." });
  const dialog = openDialog("Use as input", { class: "small-dialog" }, content);
}

async function begin() {
  let model;
  try {
    model = await getModel();
  } catch (error) {
    byId("connection").textContent = `${error.message} Reload this page to try again.`;
    byId("connection").hidden = false;
    return;
  }
  byId("summary").textContent = model.summary;

  const start = async (job) => {
    stage.add(await postJob(job));
    if (last) receive(last); // it may have the job already
    const root = byId("stage");
    const { top, bottom } = root.getBoundingClientRect();
    // On a phone the form covers the screen.
    if (bottom > 80 && top < 0.6 * innerHeight) return;
    root.setAttribute("aria-busy", "true"); // makes it as high as the screen, so that it can be scrolled to
    root.scrollIntoView();
    root.focus({ preventScroll: true });
  };
  const again = async (item) => {
    await form.fill(item);
    form.focusButton();
    announce("The form is filled as for this clip. Press Generate.");
  };
  const renew = async (item) => {
    await form.fill(item);
    form.drawSeed();
    await form.start();
  };
  // In a dialog, `wrap` closes it first.
  const makeActions = (item, wrap = (act) => act) => {
    const name = `${item.title || item.tab_title}, seed ${item.seed}`;
    return [
      ["Again with this seed", () => again(item)],
      ["New seed", () => renew(item)],
      ["Use as input", () => chooseUse(model, form, item)],
    ].map(([title, act]) => makeButton(title, wrap(act), { "aria-label": `${title}: ${name}` }));
  };
  const gallery = new Gallery(makeActions, () => stage.draw());
  const stage = new Stage({ actions: makeActions, getItems: () => gallery.items, showItem: (item) => gallery.open(item) });
  const queue = new Queue((id) => {
    stage.follow(id);
    receive(last);
    byId("stage").focus();
  });
  const studio = { limits: model.limits, getItem: (id) => gallery.getItem(id), pickItem: (description) => gallery.pick(description) };
  const form = new Form(model, studio, start);
  const checkpoint = new URLSearchParams(location.search).get("checkpoint");
  if (checkpoint) form.selectCheckpoint(checkpoint);

  const { title } = document;
  let last = null;
  const receive = (state) => {
    last = state;
    stage.update(state);
    queue.update(state, stage.job);
    gallery.update(state.gallery);
    const { job } = stage;
    const progress = job && isActive(job) && job.steps ? `${Math.round((100 * job.step) / job.steps)} % · ` : "";
    document.title = `${progress}${title}`;
  };
  watchState(receive, showConnection);
}

begin();
