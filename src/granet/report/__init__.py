"""Reports: pages, charts and the data of runs behind them."""
