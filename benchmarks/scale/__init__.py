"""Several hosts as network namespaces of one machine (`hosts`), and a cost model up to 1,024 ranks (`model`)."""
