"""Lets gettext see Mermaid diagrams: the source of a diagram is one message."""

from collections.abc import Iterable

from docutils import nodes
from sphinx.addnodes import translatable
from sphinx.application import Sphinx
from sphinxcontrib.mermaid import Mermaid, mermaid


class TranslatableMermaid(mermaid, translatable):
    """A diagram; the builders' visitors for `mermaid` take it as one."""

    def preserve_original_messages(self) -> None:
        """Keep the source as it was before translation."""
        self["original_code"] = self["code"]

    def apply_translated_message(self, original_message: str, translated_message: str) -> None:
        """Take the translated source."""
        if self["original_code"] == original_message:
            self["code"] = translated_message

    def extract_original_messages(self) -> Iterable[str]:
        """Return the source as it was before translation."""
        return [self["original_code"]]


class TranslatableMermaidDirective(Mermaid):
    """The directive of sphinxcontrib-mermaid, with a node that gettext sees."""

    def run(self) -> list[nodes.Node]:
        """Make the node."""
        made = super().run()
        for node in made:
            if type(node) is mermaid:
                node.__class__ = TranslatableMermaid
                node.source, node.line = self.state_machine.get_source_and_line(self.lineno)
        return made


def setup(app: Sphinx) -> dict[str, bool]:
    """Replace the directive."""
    app.add_directive("mermaid", TranslatableMermaidDirective, override=True)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
