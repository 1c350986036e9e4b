// The server's interface.

export class ApiError extends Error {
  /** `field` is the name of the field that the error is of; `status` is 0 if the server was not reached. */
  constructor(text, status, field = null) {
    super(text);
    this.status = status;
    this.field = field;
  }
}

const UNREACHED = "The server does not answer. Is it running? Try again in a moment.";

async function request(address, options) {
  let response;
  try {
    response = await fetch(address, options);
  } catch {
    throw new ApiError(UNREACHED, 0);
  }
  if (response.ok) return response.status === 204 ? null : response.json();
  throw makeError(await response.text(), response.status);
}

function makeError(text, status) {
  try {
    const { error, field } = JSON.parse(text);
    return new ApiError(error, status, field);
  } catch {
    return new ApiError(`The server answered with an error (${status}). Its terminal says more.`, status);
  }
}

export const getModel = () => request("api/model");
export const getState = () => request("api/state");
export const getItems = async () => (await request("api/items")).items;
export const getUpload = (id) => request(`api/uploads/${encodeURIComponent(id)}`);
export const deleteItem = (id) => request(`api/items/${encodeURIComponent(id)}`, { method: "DELETE" });
export const deleteJob = (id) => request(`api/jobs/${encodeURIComponent(id)}`, { method: "DELETE" });
export const getPreviewAddress = (job) => `api/jobs/${encodeURIComponent(job.id)}/preview?v=${job.preview}`;

/** Start a job, and return its id. */
export async function postJob(job) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(job) };
  return (await request("api/jobs", options)).job;
}

/** Return a prompt as the server's language model expands it. */
export async function postExpansion(prompt) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ prompt }) };
  return (await request("api/expand", options)).prompt;
}

/** Send a file; `signal` stops it, and `onProgress` receives the fraction that is sent. */
export function postUpload(file, kind, { signal, onProgress }) {
  // fetch does not tell how much is sent.
  return new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest();
    sending.open("POST", `api/uploads?kind=${kind}`);
    sending.upload.addEventListener("progress", (event) => {
      if (event.lengthComputable) onProgress(event.loaded / event.total);
    });
    sending.addEventListener("load", () => {
      if (sending.status === 200 || sending.status === 201) resolve(JSON.parse(sending.responseText));
      else reject(makeError(sending.responseText, sending.status));
    });
    sending.addEventListener("error", () => reject(new ApiError("The file could not be sent: the connection ended. Try again.", 0)));
    sending.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")));
    signal.addEventListener("abort", () => sending.abort());
    const parts = new FormData();
    parts.append("file", file, file.name || "pasted.png");
    sending.send(parts);
  });
}

const RETRY = 2000; // milliseconds

/** Call `onState` with every state of this user, and `onConnection` with whether the server answers. */
export function watchState(onState, onConnection) {
  let events = null;
  let isOpen = false;
  const receive = (state) => {
    onConnection(true, "");
    onState(state);
  };
  const listen = () => {
    if (events || document.hidden) return;
    events = new EventSource("api/events");
    events.addEventListener("open", () => {
      isOpen = true;
      onConnection(true, "");
    });
    events.addEventListener("message", (event) => receive(JSON.parse(event.data)));
    events.addEventListener("error", ({ target }) => {
      if (isOpen) onConnection(false, "");
      isOpen = false;
      if (target.readyState !== EventSource.CLOSED) return; // a browser tries again by itself
      events = null;
      setTimeout(listen, RETRY);
    });
  };
  const close = () => {
    events?.close();
    events = null;
    isOpen = false;
  };
  // Where no events arrive, as behind some proxies, the state is asked for.
  const poll = async () => {
    if (!isOpen) {
      try {
        receive(await getState());
      } catch (error) {
        onConnection(false, error.status ? error.message : "");
      }
    }
    setTimeout(poll, RETRY);
  };
  // A browser opens few connections to one server, which tabs in the background must not hold.
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : listen()));
  addEventListener("pagehide", close);
  addEventListener("pageshow", listen);
  listen();
  setTimeout(poll, RETRY);
}
