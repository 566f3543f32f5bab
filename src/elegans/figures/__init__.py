"""Figures: rows of a store to a plotly figure, each with a caption that says what is plotted, its unit, n and interval."""

from elegans.figures.attention import attention_map, circuit_curves
from elegans.figures.catalogue import Catalogue, Facts, Grouping, Tables, catalogue
from elegans.figures.curves import curves, timeline
from elegans.figures.effects import Lead, Strip, ablation, lead_forest, leads, strips
from elegans.figures.lines import Draw, Drawing, drawing
from elegans.figures.maps import position_map, probe_map
from elegans.figures.paper import save_paper_figures
from elegans.figures.quiet import ablation_figure, features_figure, save_quiet_figures, scaling_figure
from elegans.figures.scaling import scaled, scaling
from elegans.figures.style import caption, template
from elegans.figures.within import within

__all__ = [
    "Catalogue", "Draw", "Drawing", "Facts", "Grouping", "Lead", "Strip", "Tables", "ablation", "ablation_figure", "attention_map",
    "caption", "catalogue", "circuit_curves", "curves", "drawing", "features_figure", "lead_forest", "leads", "position_map", "probe_map",
    "save_paper_figures", "save_quiet_figures", "scaled", "scaling", "scaling_figure", "strips", "template", "timeline", "within",
]  # fmt: skip
