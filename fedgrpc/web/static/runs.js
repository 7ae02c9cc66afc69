// Keep the list of runs up to date while it is looked at. Without this script, a reload does.

const PERIOD_MS = 3000;
const main = document.getElementById("main");
const pill = document.querySelector(".who .pill");

async function refresh() {
  // Nobody's keyboard is taken away from under them.
  if (document.hidden || (document.activeElement !== main && main.contains(document.activeElement))) return;
  try {
    const answer = await fetch("/runs");
    if (!answer.ok || answer.redirected) return;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    main.replaceChildren(...fresh.getElementById("main").childNodes);
    const now = fresh.querySelector(".who .pill");
    if (pill && now) [pill.className, pill.textContent] = [now.className, now.textContent];
  } catch {
    // The aggregator is away: what is shown is of before.
    if (pill) [pill.className, pill.textContent] = ["pill bad", "no answer"];
  }
}

setInterval(refresh, PERIOD_MS);
