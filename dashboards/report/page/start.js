// --- the page begins ------------------------------------------------------------------------------------------------
showRuns();
showMoment();
fill();
openAddress();
drawPage();

// On paper: the whole table, and everything that is folded.
window.addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("main > section > details")) folded.open = true;
  limit = Infinity;
  fill();
});

// --- a run that goes on ---------------------------------------------------------------------------------------------
if (data.reload) {
  if (saved.scroll) window.scrollTo({ top: saved.scroll, behavior: "instant" });
  window.addEventListener("beforeunload", () => save({ scroll: window.scrollY }));
  setInterval(() => {
    const isBusy = document.hidden || document.activeElement === search || opened.size || window.getSelection().toString();
    if (!isBusy) location.reload();
  }, 1000 * data.reload);
}
