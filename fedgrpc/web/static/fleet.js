// Search while typing: the server searches, and sends the rows. Without this script, the button does.

const form = document.getElementById("search");
const found = document.getElementById("found");
let waiting = 0;
let latest = 0;

async function search() {
  const parameters = new URLSearchParams(new FormData(form));
  for (const [name, value] of [...parameters]) if (!value || (name === "order" && value === "name")) parameters.delete(name);
  const mine = ++latest;
  const shown = `/fleet?${parameters}`;
  const answer = await fetch(`${shown}${parameters.size ? "&" : ""}part=rows`);
  // A later search may have been answered before.
  if (!answer.ok || mine !== latest) return;
  found.innerHTML = await answer.text();
  history.replaceState(null, "", parameters.size ? shown : "/fleet");
}

form.addEventListener("input", (event) => {
  clearTimeout(waiting);
  waiting = setTimeout(search, event.target.type === "search" ? 200 : 0);
});
