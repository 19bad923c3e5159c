; Whatever code a test gives: -DWIDTH=64|32|16 -DORG=n, and the code in code.inc, which
; the test writes into the folder that it includes from.

bits WIDTH
org ORG
%include "code.inc"
