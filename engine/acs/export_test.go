package acs

// RPCSignature is for the golden vector that Verify refuses for its want of a nonce.
var RPCSignature = rpcSignature
