"""The look: colours, type and spacing as a Gradio theme, the rest in ``static/style.css``.

All fonts come with Gradio, so the app looks the same offline.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from gradio.themes import LocalFont
from gradio.themes.utils import sizes
from gradio.themes.utils.colors import Color

STATIC = Path(__file__).parent / "static"

IRIS = Color(
    name="iris",
    c50="#f4f4fe",
    c100="#e9e8fc",
    c200="#d5d3f8",
    c300="#b7b3f1",
    c400="#938de6",
    c500="#6f67d9",
    c600="#5449c4",
    c700="#463ca5",
    c800="#393283",
    c900="#2f2b68",
    c950="#1c193f",
)
INK = Color(
    name="ink",
    c50="#f8f8fa",
    c100="#f1f1f5",
    c200="#e3e3ea",
    c300="#cdcdd8",
    c400="#9a9aaa",
    c500="#6b6b7b",
    c600="#52525f",
    c700="#3a3a44",
    c800="#25252c",
    c900="#19191e",
    c950="#111115",
)


class StudioTheme(gr.themes.Base):
    """Light and dark greys with one accent colour."""

    def __init__(self) -> None:
        super().__init__(
            primary_hue=IRIS,
            secondary_hue=IRIS,
            neutral_hue=INK,
            spacing_size=sizes.spacing_md,
            radius_size=sizes.radius_md,
            text_size=sizes.text_md,
            font=(LocalFont("IBM Plex Sans", weights=(400, 700)), "ui-sans-serif", "system-ui", "sans-serif"),
            font_mono=(LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "monospace"),
        )
        self.name = "adapter-studio"
        self.set(**_surfaces(), **_forms(), **_buttons())


def css() -> str:
    """The style sheet of the app."""
    return (STATIC / "style.css").read_text(encoding="utf-8")


def script(name: str) -> str:
    """A script of the app (``static/<name>.js``)."""
    return (STATIC / f"{name}.js").read_text(encoding="utf-8")


def _surfaces() -> dict[str, str]:
    return {
        "body_background_fill": "*neutral_50",
        "body_background_fill_dark": "*neutral_950",
        "body_text_color": "#1b1b22",
        "body_text_color_dark": "#ececf1",
        "body_text_color_subdued": "#5f5f6e",
        "body_text_color_subdued_dark": "#a3a3b1",
        "background_fill_primary": "white",
        "background_fill_primary_dark": "*neutral_900",
        "background_fill_secondary": "*neutral_100",
        "background_fill_secondary_dark": "*neutral_800",
        "border_color_primary": "*neutral_200",
        "border_color_primary_dark": "#2e2e37",
        "color_accent_soft": "*primary_50",
        "color_accent_soft_dark": "#26243c",
        "link_text_color": "*primary_600",
        "link_text_color_dark": "*primary_300",
        "block_background_fill": "white",
        "block_background_fill_dark": "*neutral_900",
        "block_border_width": "1px",
        "block_border_color": "*neutral_200",
        "block_border_color_dark": "#2e2e37",
        "block_shadow": "none",
        "block_radius": "12px",
        "container_radius": "12px",
        "block_padding": "14px",
        "layout_gap": "16px",
        "form_gap_width": "0px",
        "shadow_drop": "0 1px 2px rgba(20, 20, 40, .06)",
        "shadow_drop_lg": "0 8px 24px rgba(20, 20, 40, .10)",
        "panel_border_width": "0px",
        "accordion_text_color": "*body_text_color",
    }


def _forms() -> dict[str, str]:
    return {
        "block_title_text_color": "*body_text_color",
        "block_title_text_color_dark": "*body_text_color",
        "block_title_text_size": "13px",
        "block_title_text_weight": "700",
        "block_label_text_color": "*body_text_color_subdued",
        "block_label_text_size": "*text_xs",
        "block_label_background_fill": "white",
        "block_label_background_fill_dark": "*neutral_900",
        "block_info_text_color": "*body_text_color_subdued",
        "block_info_text_color_dark": "*body_text_color_subdued",
        "block_info_text_size": "12px",
        "input_background_fill": "white",
        "input_background_fill_dark": "#202026",
        "input_border_color": "*neutral_300",
        "input_border_color_dark": "#3d3d48",
        "input_border_color_focus": "*primary_500",
        "input_border_color_focus_dark": "*primary_400",
        "input_border_width": "1px",
        "input_radius": "8px",
        "input_shadow_focus": "0 0 0 3px rgba(111, 103, 217, .18)",
        "input_shadow_focus_dark": "0 0 0 3px rgba(147, 141, 230, .28)",
        "input_placeholder_color": "#767686",
        "input_placeholder_color_dark": "#8b8b9a",
        "slider_color": "*primary_600",
        "slider_color_dark": "*primary_400",
        "checkbox_background_color_selected": "*primary_600",
        "checkbox_background_color_selected_dark": "*primary_500",
        "checkbox_border_color_selected": "*primary_600",
        "checkbox_label_background_fill": "white",
        "checkbox_label_background_fill_dark": "#202026",
        "checkbox_label_background_fill_selected": "*primary_50",
        "checkbox_label_background_fill_selected_dark": "#2b2947",
        "checkbox_label_border_color": "*neutral_300",
        "checkbox_label_border_color_dark": "#3d3d48",
        "checkbox_label_border_color_selected": "*primary_500",
        "checkbox_label_border_color_selected_dark": "*primary_400",
        "checkbox_label_text_color_selected": "*primary_800",
        "checkbox_label_text_color_selected_dark": "*primary_100",
        "checkbox_label_border_width": "1px",
    }


def _buttons() -> dict[str, str]:
    return {
        "button_border_width": "1px",
        "button_large_radius": "10px",
        "button_medium_radius": "8px",
        "button_small_radius": "8px",
        "button_large_text_weight": "700",
        "button_medium_text_weight": "700",
        "button_small_text_weight": "700",
        "button_primary_background_fill": "*primary_600",
        "button_primary_background_fill_dark": "#675fd2",
        "button_primary_background_fill_hover": "*primary_700",
        "button_primary_background_fill_hover_dark": "#7c74e2",
        "button_primary_border_color": "*primary_600",
        "button_primary_border_color_dark": "#675fd2",
        "button_primary_text_color": "white",
        "button_primary_text_color_dark": "white",
        "button_secondary_background_fill": "white",
        "button_secondary_background_fill_dark": "*neutral_800",
        "button_secondary_background_fill_hover": "*neutral_100",
        "button_secondary_background_fill_hover_dark": "*neutral_700",
        "button_secondary_border_color": "*neutral_300",
        "button_secondary_border_color_dark": "#3d3d48",
        "button_secondary_text_color": "*body_text_color",
        "button_secondary_text_color_dark": "*body_text_color",
        "button_cancel_background_fill": "white",
        "button_cancel_background_fill_dark": "*neutral_800",
        "button_cancel_background_fill_hover": "#fdeeee",
        "button_cancel_background_fill_hover_dark": "#40232a",
        "button_cancel_border_color": "#e3b4b4",
        "button_cancel_border_color_dark": "#6b3a41",
        "button_cancel_text_color": "#a32626",
        "button_cancel_text_color_dark": "#f4a3a3",
    }
