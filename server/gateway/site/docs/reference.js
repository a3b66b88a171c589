// Shows the OpenAPI document that the query names, `?api=/openapi/teable.json`, with Swagger UI.

const select = document.getElementById("api");
const documents = await (await fetch("/openapi/index.json")).json();
select.append(...documents.map(({ name, url }) => new Option(name, url)));
const asked = new URLSearchParams(location.search).get("api");
const shown = documents.find(({ url }) => url === asked) ?? documents[0];
select.value = shown.url;
document.getElementById("document").href = shown.url;
select.addEventListener("change", () => location.assign(`/docs?api=${select.value}`));

const dark = matchMedia("(prefers-color-scheme: dark)");
const followScheme = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", followScheme);
followScheme();

SwaggerUIBundle({
  url: shown.url,
  domNode: document.getElementById("reference"),
  deepLinking: true,
  displayRequestDuration: true,
  defaultModelsExpandDepth: 0,
  // No other host is asked to validate the document.
  validatorUrl: null,
});
