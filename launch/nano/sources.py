"""The Debian packages (section main) whose documentation makes up the training text."""

# Name -> most prose to take, in MB. API references are capped low: they repeat themselves.
PACKAGES: dict[str, float] = {
    # Handbooks, guides and books
    "debian-handbook": 8, "debian-reference-en": 8, "developers-reference": 8, "debian-faq": 8,
    "debian-policy": 8, "installation-guide-amd64": 8, "maint-guide": 8, "harden-doc": 8,
    "debian-history": 8, "debian-kernel-handbook": 8, "debmake-doc": 8, "live-manual-html": 8,
    "aptitude-doc-en": 8, "apt-doc": 8, "doc-debian": 8, "debian-edu-doc-en": 8,
    "freedombox-doc-en": 8, "packaging-tutorial": 2, "cfi-en": 8,
    "c++-annotations-html": 8, "jargon-text": 8, "dict-foldoc": 8, "dict-devil": 2,
    "bible-kjv-text": 0, "docbook-xsl-doc-text": 2,
    # Desktop manuals
    "gnome-user-docs": 8, "libreoffice-help-en-us": 8, "gimp-help-en": 8, "gnucash-docs": 8,
    "inkscape-tutorials": 2, "lyx-common": 8, "gnumeric-doc": 8, "evolution-common": 4,
    "kicad-doc-en": 8, "kmymoney-common": 8, "kate5-data": 8, "okular": 4,
    "konsole": 4, "dolphin": 4, "marble-data": 4, "kstars-data": 8, "kmail": 8, "kdevelop-data": 4,
    "umbrello-data": 4, "korganizer": 4, "kaddressbook": 4, "skrooge-common": 4, "k3b-data": 4,
    "kgpg": 4, "ark": 2, "gwenview": 2, "konqueror": 4, "kwrite": 4, "plasma-desktop-data": 4,
    "systemsettings": 4, "khelpcenter": 4, "kget": 2, "lokalize": 4, "cantor": 4,
    "kalzium-data": 4, "kgeography-data": 2, "parley-data": 4, "step": 2, "kturtle": 4,
    "kontact": 2, "calligra-data": 4, "drgeo-doc": 2, "engauge-digitizer-doc": 2,
    "expeyes-doc-en": 2, "rosegarden": 4, "gramps": 2, "renpy-doc": 4, "hydrogen-doc": 2,
    "freeciv-data": 2, "audacity-data": 2, "csound-doc": 6, "snd-doc": 4, "puredata-doc": 2,
    "lilypond-doc-html": 6, "sonic-pi": 2,
    # Systems and administration
    "linux-doc-6.1": 16, "manpages": 8, "manpages-dev": 6, "apache2-doc": 8, "exim4-doc-html": 8,
    "postfix-doc": 6, "bind9-doc": 6, "haproxy-doc": 4, "squid": 2, "varnish-doc": 4,
    "shorewall-doc": 8, "bacula-doc": 10, "icinga2-doc": 4, "slurm-wlm-doc": 6, "frr-doc": 4,
    "ntpsec-doc": 4, "libvirt-doc": 4, "dpdk-doc": 8, "openvswitch-doc": 4, "ovn-doc": 2,
    "munin-doc": 2, "pcp-doc": 4, "systemtap-doc": 4, "valgrind": 4, "selinux-policy-doc": 2,
    "nova-doc": 6, "neutron-doc": 8, "cinder-doc": 6, "swift-doc": 6, "keystone-doc": 6,
    "glance-doc": 6, "ironic-doc": 6, "heat-doc": 4, "wireshark-doc": 6, "gnutls-doc": 4,
    "libssl-doc": 4, "openssl": 2, "xorg-docs": 6, "cups": 4, "ghostscript-doc": 4,
    "imagemagick-6-doc": 6, "aspell-doc": 2, "zsh-doc": 4, "bash-doc": 4, "vim-doc": 6,
    "vim-runtime": 8, "git-doc": 8, "git-annex": 12, "ikiwiki": 6, "buildbot-doc": 4,
    "mercurial": 4, "mercurial-common": 6, "mutt": 2, "gnupg": 2, "info": 4, "texinfo": 4,
    "groff": 4, "autoconf-doc": 4, "flex-doc": 4, "autogen-doc": 4, "glibc-doc": 4,
    # Databases
    "postgresql-doc-15": 12, "postgis-doc": 4, "sqlite3-doc": 12, "slony1-2-doc": 4,
    "python-sqlalchemy-doc": 8,
    # Languages and libraries
    "python3.11-doc": 16, "perl-doc": 16, "rust-doc": 12, "ghc-doc": 8, "erlang-doc": 10,
    "racket-doc": 12, "tcl8.6-doc": 4, "tk8.6-doc": 4, "tcllib": 6, "sbcl-doc": 4,
    "mit-scheme-doc": 4, "guile-3.0-doc": 4, "gcl-doc": 4, "fp-docs-3.2.2": 6, "nasm": 4,
    "nodejs-doc": 6, "python-django-doc": 10, "sphinx-doc": 4, "docutils-doc": 6,
    "twisted-doc": 8, "python-celery-doc": 6, "pypy3-doc": 4, "cmake-doc": 6, "meson": 4,
    "libstdc++-12-doc": 5, "libboost1.74-doc": 8, "cppreference-doc-en-html": 6,
    "openjdk-17-doc": 8, "qtbase5-doc-html": 8, "qtdeclarative5-doc-html": 5,
    "qtcreator-doc": 6, "libgtk-3-doc": 5, "libgtk-4-doc": 5, "libglib2.0-doc": 4,
    "libgcrypt20-doc": 2,
    # Mathematics and science
    "octave-doc": 6, "r-doc-html": 6, "r-doc-info": 4, "sagemath-doc": 8, "maxima-doc": 6,
    "gap-core": 6, "singular-doc": 4, "gnuplot-doc": 4, "scilab-doc": 6, "grass-doc": 8,
    "python-scipy-doc": 5, "python-pandas-doc": 6, "python-sklearn-doc": 8, "opencv-doc": 4,
    "pandoc": 4, "gap-doc": 6,
}  # fmt: skip

# Package -> pattern that a path must match, where most of a package is an API index.
ONLY = {
    "rust-doc": r"/(?:book|reference|nomicon|rust-by-example|rustc|cargo|rustdoc|edition-guide"
    r"|embedded-book|unstable-book|style-guide)/",
}

# Directories and file names of languages other than English, and of no prose.
LANGUAGES = (
    "af|ar|as|ast|be|bg|bn|br|bs|ca|ca@valencia|cs|cy|da|de|de-at|el|en_GB|eo|es|es-co|et|eu|fa|fi"
    "|fr|ga|gl|gu|he|hi|hr|hu|ia|id|is|it|ja|ja_JP.eucJP|ka|kk|km|kn|ko|lt|lv|mk|ml|mr|ms|nb|nb-no"
    "|nds|nl|nn|no|oc|or|pa|pl|pt|pt-br|pt_BR|pt_PT|pt-pt|ro|ru|sk|sl|sq|sr|sr@latin|sr@ijekavian"
    "|sr@ijekavianlatin|sv|ta|te|th|tr|tr_TR|ug|uk|ur|uz|vi|wa|xh|zh|zh-cn|zh-tw|zh_CN|zh_TW|zh_HK"
)
SKIP_PATHS = (
    r"(?i)/(?:changelog|news|readme\.debian|copyright|todo|authors|thanks|credits|licen[cs]e|copying"
    r"|genindex|py-modindex|search|index-all|contents|tests?|examples?|demos?|locale|_sources"
    r"|_static|_modules|whatsnew|release-notes|releasenotes|legal|fdl|gfdl|gpl)\b[^/]*(?:/|$)"
)
