"""The HTML report: one file that needs no network, from the journals of one run or of several.

A journal becomes a `history` of bounded size, that becomes words (`page`) and charts (`*_chart*`), and `html` puts both
into one page. May import the journal, `dashboards.frame`, `update_watch.report`, `kinds` and `naming`; jinja2 and
vl-convert only where they are used.
"""

from update_watch.dashboards.report.history import History, history_of, read_history
from update_watch.dashboards.report.html import render_html, write_report

__all__ = ["History", "history_of", "read_history", "render_html", "write_report"]
