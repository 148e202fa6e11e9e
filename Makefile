PYTHON ?= .venv/bin/python

build:
	python setup.py build_ext --inplace
