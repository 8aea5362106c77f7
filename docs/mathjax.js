// The equations of the notebooks, and nothing else.
window.MathJax = {
  tex: {inlineMath: [["$", "$"]]},
  options: {ignoreHtmlClass: "md-header|md-container", processHtmlClass: "notebook"},
};
