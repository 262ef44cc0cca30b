"use strict";

const dark = matchMedia("(prefers-color-scheme: dark)");
const followTheReader = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", followTheReader);
followTheReader();

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayRequestDuration: true,
  validatorUrl: null,
});
