// Values of the form, which a reload keeps. Without storage they last as long as the page.

/** Return the stored values, or {} if there are none. */
export function recall(name) {
  try {
    return JSON.parse(sessionStorage.getItem(name)) ?? {};
  } catch {
    return {};
  }
}

/** Store values. */
export function remember(name, values) {
  try {
    sessionStorage.setItem(name, JSON.stringify(values));
  } catch {
    // Full, or switched off.
  }
}
