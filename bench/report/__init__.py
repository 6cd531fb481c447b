"""Result files as one page (:func:`bench.report.page.build_page`) and as tables in Markdown files (``fill``)."""
