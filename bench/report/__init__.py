"""One page of result files: :func:`bench.report.page.build_page`; their tables in a README: ``bench.report.readme``."""
