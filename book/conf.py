"Sphinx's configuration of the book. The pages that it reads are written by `python -m book`."

import json
import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes

HERE = Path(__file__).parent
SITE = json.loads((HERE / "site.json").read_text(encoding="utf-8"))

project = SITE["title"]
author = SITE["author"]
copyright = SITE["copyright"]
version = release = SITE["version"]
language = "en"

extensions = ["myst_nb"]
exclude_patterns = ["_extra"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

# The outputs are those that the notebooks hold.
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # a section's claims are a table in Markdown
myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_dmath_allow_digits = False  # "$0.55 for prompts and $2.19" is money
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]

add_module_names = False
toc_object_entries_show_parents = "hide"

# sphinx-book-theme: the theme that this field's readers know from Jupyter Book, with launch buttons
# and a layout for phones. Three releases in 2026, on top of the pydata theme.
html_theme = "sphinx_book_theme"
html_title = SITE["title"]
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_extra_path = ["_extra"]
html_copy_source = True
html_math_renderer = "mathml"
html_theme_options = {
    "repository_url": SITE["git_url"],
    "repository_branch": SITE["branch"],
    "path_to_docs": "nbs",
    "use_repository_button": True,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search field is in the side bar
    "show_navbar_depth": 1,
    "collapse_navbar": True,  # the branch of the page alone: all of them would triple the build
    "show_toc_level": 2,
    "launch_buttons": {
        "notebook_interface": "jupyterlab",
        "binderhub_url": "https://mybinder.org",
        # Colab opens notebooks of GitHub alone
        "colab_url": "https://colab.research.google.com" if "github.com" in SITE["git_url"] else "",
    },
}


def aim_at_copies(app, pagename, templatename, context, doctree):
    "Let Colab open the copy that installs the package, which lies beside the built book."
    notebook = f"/blob/{SITE['branch']}/nbs/"
    for group in context.get("header_buttons", []):
        for button in group.get("buttons", []):
            if button.get("text") == "Colab":
                copy = f"/blob/{SITE['site_branch']}/launch/"
                button["url"] = button["url"].replace(notebook, copy)


def link_to(kind: str, target: str, page: str, text: nodes.Node) -> addnodes.pending_xref:
    "A reference that Sphinx resolves: to a name of the package, or to a page."
    domain, role = ("py", "obj") if kind == "py" else ("std", "doc")
    return addnodes.pending_xref(
        "",
        text,
        refdomain=domain,
        reftype=role,
        reftarget=target if kind == "py" else f"/{target}",
        refdoc=page,
        refexplicit=True,
        refwarn=True,
    )


def link_types(literal: nodes.literal, page: str):
    "Link the names of classes within a type, such as `dict[str, Arm]`."
    pieces = re.split(r"(\w+)", literal.astext())
    literal.clear()
    for piece in pieces:
        kind, target = SITE["links"].get(piece, ("", ""))
        text = nodes.Text(piece)
        literal += link_to(kind, target, page, nodes.inline("", text)) if kind == "py" else text


def link_code(app, doctree):
    "Link inline code that names something of the project."
    page = app.env.docname
    for literal in list(doctree.findall(nodes.literal)):
        if isinstance(literal.parent, nodes.title | nodes.reference | addnodes.pending_xref):
            continue
        if "type" in literal["classes"]:
            link_types(literal, page)
            continue
        kind, target = SITE["links"].get(literal.astext().removesuffix("()"), ("", ""))
        if kind and target != page:
            literal.replace_self(link_to(kind, target, page, literal.deepcopy()))


CODE = re.compile(
    r'(?P<dot><span class="o">\.</span>)?'  # an attribute of something else
    r'<span class="(?P<kind>n|nn|nc|nf)">(?P<name>[\w.]+)</span>'
    r'(?P<equals><span class="o">=</span>)?'  # the name of an argument
)


def link_cells(app, pagename, templatename, context, doctree):
    """Link names in cells to their pages: a module to its notebook, a name to its entry in the API.

    sphinx-codeautolink does this too, but imports what a page imports and evaluates its types, and
    fails on those of third parties."""
    names = SITE["cells"].get(pagename)
    if not names:
        return

    def link(match: re.Match) -> str:
        target = names.get(match["name"])
        is_other = match["dot"] or (match["equals"] and match["kind"] == "n")
        if not target or is_other:
            return match[0]
        page, _, anchor = target.partition("#")
        address = app.builder.get_relative_uri(pagename, page) + (f"#{anchor}" if anchor else "")
        span = match[0].removesuffix(match["equals"] or "")
        return f'<a class="code-link" href="{address}">{span}</a>' + (match["equals"] or "")

    context["body"] = CODE.sub(link, context["body"])


def visit_math(translator, node):
    "A formula as MathML, which browsers draw and screen readers read, without a script."
    is_block = isinstance(node, nodes.math_block)
    translator.body.append(tex2mathml(node.astext(), as_block=is_block))
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("doctree-read", link_code)
    app.connect("html-page-context", link_cells)
    app.connect("html-page-context", aim_at_copies, priority=900)
