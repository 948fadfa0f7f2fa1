// Stay at the end of a growing text, until the reader scrolls up.

const NEAR = 48; // pixels from the end that still count as the end
const UPWARDS = ["ArrowUp", "PageUp", "Home"];

/** Follows the end of `scroller`'s content; `button` is shown while it does not, and takes the reader there. */
export function followEnd(scroller, button) {
  let following = true;
  let last = 0; // where the text stood when it was last moved

  const distance = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
  const toEnd = () => {
    following = true;
    scroller.scrollTop = scroller.scrollHeight;
    last = scroller.scrollTop;
  };
  const grown = () => {
    if (following) toEnd();
    button.hidden = distance() < NEAR;
  };
  const scrolled = () => {
    if (scroller.scrollTop > last) following = distance() < NEAR;
    else if (scroller.scrollTop < last) following &&= distance() < 2; // a text that became shorter moves up, too
    last = scroller.scrollTop;
    button.hidden = distance() < NEAR;
  };
  // What the reader wants is known before anything moves, and the text may grow in between.
  const leave = () => (following = false);

  scroller.addEventListener("scroll", scrolled, { passive: true });
  scroller.addEventListener("wheel", (event) => event.deltaY < 0 && leave(), { passive: true });
  scroller.addEventListener("touchmove", leave, { passive: true });
  scroller.addEventListener("keydown", (event) => UPWARDS.includes(event.key) && leave());
  button.addEventListener("click", toEnd);
  const observer = new ResizeObserver(grown);
  for (const child of [scroller, ...scroller.children]) observer.observe(child);
  return { toEnd };
}
