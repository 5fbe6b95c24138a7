/** Making and changing elements. Text is always set as text, never as HTML: jobs carry what strangers wrote. */

export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Set a text only when it differs, so that what screen readers say and people select is left alone. */
export function setText(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

export function setAttribute(element, name, value) {
  if (value === null || value === undefined) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

export function show(element, isShown) {
  if (element.hidden === isShown) element.hidden = !isShown;
}

/**
 * Give a parent one child per item, in order. Children stay the same elements, and keep the focus.
 * Items may share a key, as jobs that were submitted with one id do.
 */
export function keyed(parent, items, keyOf, make, update) {
  const keys = uniqueKeys(items.map(keyOf));
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const focused = parent.getRootNode().activeElement;
  for (const key of keys) known.delete(key);
  for (const child of known.values()) child.remove(); // first, so that those which stay need not move
  const staying = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const [index, item] of items.entries()) {
    const child = staying.get(keys[index]) ?? make(item);
    child.dataset.key = keys[index];
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
    update(child, item);
  }
  if (parent.contains(focused) && parent.getRootNode().activeElement !== focused) focused.focus({ preventScroll: true });
}

function uniqueKeys(keys) {
  const counts = new Map();
  return keys.map((key) => {
    const count = counts.get(key) ?? 0;
    counts.set(key, count + 1);
    return count ? `${key}#${count}` : String(key);
  });
}
