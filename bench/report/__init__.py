"""Charts, one page of result files (:func:`bench.report.page.build_page`) and tables in Markdown files (``fill``)."""
