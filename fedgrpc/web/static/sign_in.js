// The secret is the fragment of the link: browsers send no fragment, so no log of a server or proxy has it.

const form = document.getElementById("sign-in");
const secret = location.hash.slice(1);
if (secret) {
  history.replaceState(null, "", location.pathname);
  form.elements.secret.value = secret;
  form.requestSubmit();
}
